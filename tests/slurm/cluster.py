"""A real SLURM on one machine, for tests: a controller and a few nodes, each a slurmd in a host name space of its own.

    python -m tests.slurm.cluster install          munge and SLURM from the distribution (Debian, Ubuntu)
    python -m tests.slurm.cluster start [NODES]    4 by default
    python -m tests.slurm.cluster crash NODE       kill everything on a node at once, as a power cut would
    python -m tests.slurm.cluster boot NODE
    python -m tests.slurm.cluster stop

Needs root and its own UTS name spaces (CAP_SYS_ADMIN); no systemd, no cgroups, no GPUs. All nodes share this
machine's cores, files and loopback device. Two partitions: jobs in ``urgent`` preempt those in ``normal``, which are
requeued after a grace time.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PACKAGES = ("munge", "slurm-client", "slurmctld", "slurmd")
GRACE_S = 15

CONFIGURATION = """
ClusterName=megavlm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=86400
KillWait=15
SlurmdTimeout=10
TCPTimeout=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Unavailable(Exception):
    """SLURM cannot be run here; the message says why."""


class Cluster:
    """Starts and stops the daemons.

    Args:
        folder: For all files; every folder above it must belong to root, or munge refuses its socket.
        port: Of the controller; the nodes take the following ones.
    """

    def __init__(self, folder: Path = Path("/tmp/megavlm_slurm"), port: int = 26500):
        self.folder, self.port = folder, port
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    @staticmethod
    def install() -> None:
        """Install the packages unless they are there.

        Raises:
            Unavailable: If this cannot be done here.
        """
        if all(shutil.which(name) for name in ("munged", "sbatch", "slurmctld", "slurmd")):
            return
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise Unavailable("SLURM is not installed, and installing it needs root and apt-get")
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for attempt in (command, ["apt-get", "update"], command):
            done = subprocess.run(attempt, env=quiet, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if attempt is command and done.returncode == 0:
                return
        raise Unavailable(f"the SLURM packages cannot be installed: {done.stderr.strip()[-500:]}")

    def start(self, num_nodes: int = 4, cpus: int = 4, extra: str = "") -> None:
        """Start everything and wait until all nodes are idle.

        Raises:
            Unavailable: If name spaces are not allowed here.
            RuntimeError: If a daemon does not come up.
        """
        if os.geteuid() != 0:
            raise Unavailable("the daemons of SLURM need root")
        if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
            raise Unavailable("this machine does not allow host name spaces (CAP_SYS_ADMIN)")
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("state", "spool", "log", "names"):
            (self.folder / name).mkdir(parents=True)
        nodes = [f"node{i}" for i in range(1, num_nodes + 1)]
        text = CONFIGURATION.format(
            host=os.uname().nodename.split(".")[0], port=self.port, folder=self.folder, grace_s=GRACE_S, extra=extra
        )
        for i, node in enumerate(nodes, 1):
            text += f"NodeName={node} NodeAddr=127.0.1.{i} Port={self.port + i} CPUs={cpus} RealMemory=4000\n"
        # partitions name ALL nodes, so they come last
        lines = text.splitlines()
        partitions = [line for line in lines if line.startswith("PartitionName")]
        others = [line for line in lines if not line.startswith("PartitionName")]
        (self.folder / "slurm.conf").write_text("\n".join(others + partitions) + "\n")
        self._start_munge()
        self._run("slurmctld")
        self._wait(lambda: self._ask("sinfo").returncode == 0, 20, "the controller does not answer")
        for i, node in enumerate(nodes, 1):
            self._name_node(node, f"127.0.1.{i}")
            self.boot(node)
        self._wait(lambda: self.num_idle() == num_nodes, 30, "the nodes do not become idle")

    def stop(self) -> None:
        """End every daemon and everything that runs on the nodes."""
        self._end_daemon("slurmctld", self.folder / "slurmctld.pid")
        for names in (self.folder / "names").glob("*"):
            self.crash(names.name)
            subprocess.run(["umount", str(names)], capture_output=True)
        self._end_daemon("munged", self.folder / "munge" / "pid")

    def boot(self, node: str) -> None:
        """Start a node's daemon."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._run("nsenter", f"--uts={self.folder / 'names' / node}", "slurmd", "-N", node)

    def crash(self, node: str) -> None:
        """Kill all processes of a node until none is left."""
        while pids := self.processes(node):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def processes(self, node: str) -> list[int]:
        """The processes whose host name is the node's."""
        mark, found = (self.folder / "names" / node).stat(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                here = (process / "ns" / "uts").stat()
                if (here.st_ino, here.st_dev) == (mark.st_ino, mark.st_dev):
                    found.append(int(process.name))
        return found

    def num_idle(self) -> int:
        """Idle nodes."""
        answer = self._ask("sinfo", "--noheader", "--partition=normal", "--states=idle", "--format=%D").stdout.split()
        return int(answer[0]) if answer else 0

    def ask(self, *command: str) -> str:
        """What a client command prints.

        Raises:
            RuntimeError: If it fails.
        """
        return self._run(*command)

    def _ask(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)

    def _run(self, *command: str) -> str:
        done = self._ask(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}\n{self._logs()}")
        return done.stdout

    def _name_node(self, node: str, address: str) -> None:
        hosts = Path("/etc/hosts")
        if node not in hosts.read_text().split():
            with hosts.open("a") as file:
                file.write(f"{address} {node}\n")
        # a name space lives on in a file that it is mounted on
        (self.folder / "names" / node).touch()
        self._run("unshare", f"--uts={self.folder / 'names' / node}", "hostname", node)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._run("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", *options)

    def _end_daemon(self, name: str, pid_file: Path) -> None:
        try:
            pid = int(pid_file.read_text())
            # the number may belong to another process by now
            if name not in os.readlink(f"/proc/{pid}/exe"):
                return
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                os.readlink(f"/proc/{pid}/exe")
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            pass

    def _wait(self, condition, timeout_s: float, complaint: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{complaint}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted((self.folder / "log").glob("*")))


def main() -> None:
    command, *arguments = sys.argv[1:] or ["help"]
    cluster = Cluster()
    if command == "start":
        cluster.start(int(arguments[0]) if arguments else 4)
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    elif command in ("install", "stop"):
        getattr(cluster, command)()
    elif command in ("boot", "crash"):
        getattr(cluster, command)(arguments[0])
    else:
        print(__doc__)


if __name__ == "__main__":
    main()
