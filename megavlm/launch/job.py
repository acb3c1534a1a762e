"""What is asked of SLURM for a run: the options of `megavlm submit`, checked before the job has waited for a day.

Tested by `tests/launch/test_submit.py`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from megavlm.errors import ConfigError

EARLY_S = 60
"""SLURM may send the warning up to a minute before it was asked to."""

_UNITS_S = {
    r"(\d+)": (60,),
    r"(\d+):(\d+)": (60, 1),
    r"(\d+):(\d+):(\d+)": (3600, 60, 1),
    r"(\d+)-(\d+)": (86400, 3600),
    r"(\d+)-(\d+):(\d+)": (86400, 3600, 60),
    r"(\d+)-(\d+):(\d+):(\d+)": (86400, 3600, 60, 1),
}
TIME_FORMATS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"


NETWORK = """
# RDMA pins buffers
ulimit -l unlimited 2>/dev/null || echo "locked memory stays limited to $(ulimit -l) KiB: InfiniBand may need more"
# NCCL: say what is wrong, one file per process; wait longer for a link that comes back; keep the last collectives for a hang's report
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
mkdir -p "$RUN/hangs"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$RUN/hangs/nccl-rank-}
"""


@dataclass(frozen=True)
class Job:
    """What to ask SLURM for; see `megavlm submit --help`."""

    nodes: int = 1
    gpus_per_node: int = 8
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int = 8
    container_image: str | None = None
    modules: str | None = None
    setup: str | None = None
    cache: str | None = None
    max_restarts: int = 100
    template: str | None = None
    sbatch_options: str = ""
    warning_s: int = 120
    """Seconds before the time limit at which SLURM sends SIGUSR1 (up to a minute earlier, it says); 0 for never."""
    node_failure_wait_s: int = 300
    """How long a run whose processes vanished waits for SLURM to notice a lost node."""
    srun_options: str = "--cpu-bind=cores --distribution=block:block"
    """How processes are bound: by default each to whole cores, neighbours beside neighbours, as GPUs are numbered."""
    node_check: bool = True
    """Look at every node before the first step, and leave those out that are not well."""

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    def check(self, stop_margin_s: float) -> None:
        """Refuse what SLURM would refuse, or what would end the run as soon as it starts.

        Args:
            stop_margin_s: The recipe's ``engine.stop_margin_s``: so long before its end a run saves at the latest.

        Raises:
            ConfigError: Says which option.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            # a line of shell may be several
            if isinstance(value, str) and field.name != "setup":
                check_line(f"--{field.name.replace('_', '-')}", value)
        if self.cache and re.search(r'["\\`]', self.cache):
            raise ConfigError(
                f"--cache={self.cache}: the shell would take its quotes away\n  do:    name a folder without quotes and backslashes"
            )
        limit_s = self.limit_s
        if limit_s is None:
            return
        told_s = self.warning_s + EARLY_S if self.warning_s else 0
        if limit_s <= max(told_s, stop_margin_s):
            why = f"engine.stop_margin_s = {stop_margin_s:.0f} s"
            if told_s > stop_margin_s:
                why = f"--warning-s={self.warning_s}, which SLURM may send {EARLY_S} s earlier"
            raise ConfigError(
                f"the time limit of {limit_s} s is over before the run has begun: it is told to save and end"
                f" {max(told_s, stop_margin_s):.0f} s before ({why})\n"
                f"  do:    ask for more --time; or give a smaller --warning-s (0: the run watches the clock by itself)"
                " or engine.stop_margin_s"
            )

    @property
    def limit_s(self) -> int | None:
        """The time limit; None if there is none.

        Raises:
            ConfigError: If it is no time.
        """
        given = [] if self.time is None else [str(self.time)]
        given += [found[1] for option in self._options() if (found := re.fullmatch(r"(?:--time[= ]|-t ?)'?([^']*)'?", option))]
        limits_s = [seconds_of(text) for text in given]
        return limits_s[-1] if limits_s else None

    def option_lines(self) -> str:
        """The #SBATCH lines that not every job has."""
        given = {"partition": self.partition, "time": self.time, "account": self.account, "qos": self.qos}
        lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]
        if self.gpus_per_node:
            lines.append(f"#SBATCH --gpus-per-node={self.gpus_per_node}")
        if self.warning_s:
            # to every process of the run; it saves and ends then
            lines.append(f"#SBATCH --signal=USR1@{self.warning_s}")
        lines += [f"#SBATCH {option}" for option in self._options()]
        return "\n".join(lines)

    def srun_line(self) -> str:
        """Options of the srun that trains. Every process sees all GPUs of its node and takes its own: so NCCL can copy between them."""
        return f"{self.srun_options} --gpu-bind=none" if self.gpus_per_node else self.srun_options

    def container_words(self) -> tuple[str, str]:
        """What stands before the options and before the interpreter's name: for pyxis (squashfs, registries), or for Apptainer (.sif)."""
        if not self.container_image:
            return "", ""
        image = shlex.quote(self.container_image)
        if self.container_image.endswith(".sif"):
            return "", f"apptainer exec {'--nv ' if self.gpus_per_node else ''}{image} "
        return f"--container-image={image} ", ""

    def network_lines(self) -> str:
        """What NCCL is told, unless the environment says otherwise; docs/slurm.md has the reasons."""
        return NETWORK if self.gpus_per_node else ""

    def setup_lines(self) -> str:
        """Modules, and what the user wants to be done first."""
        lines = []
        if self.modules:
            lines.append(f"module load {' '.join(shlex.quote(name.strip()) for name in self.modules.split(','))}")
        if self.setup:
            lines.append(self.setup)
        return "\n".join(lines)

    def torchrun(self, recipe: Path) -> str:
        """The command for a single node without SLURM."""
        return f"torchrun --standalone --nproc-per-node {self.tasks_per_node} -m megavlm train {shlex.quote(str(recipe))}"

    def _options(self) -> Iterator[str]:
        """The further options, one each with its value, quoted."""
        try:
            words = shlex.split(self.sbatch_options)
        except ValueError as error:
            raise ConfigError(f"--sbatch-options={self.sbatch_options}: {error}\n  do:    close the quotes") from error
        option: list[str] = []
        for word in words:
            if word.startswith("-") and option:
                yield shlex.join(option)
                option = []
            option.append(word)
        if option:
            yield shlex.join(option)


def seconds_of(time: str) -> int | None:
    """SLURM's spelling of a time limit; None if it means no limit.

    Raises:
        ConfigError: If SLURM would refuse it.
    """
    if time.lower() in ("unlimited", "infinite", "-1"):
        return None
    for pattern, units_s in _UNITS_S.items():
        if found := re.fullmatch(pattern, time, re.ASCII):
            return sum(int(number) * unit_s for number, unit_s in zip(found.groups(), units_s, strict=True)) or None
    raise ConfigError(f"--time={time} is no time limit\n  do:    write {TIME_FORMATS}; or UNLIMITED")


def check_line(name: str, text: str) -> None:
    """Refuse text that would be more than one line of a script.

    Raises:
        ConfigError: Says where it stands.
    """
    if not text.isprintable():
        raise ConfigError(f"{name}: {text!r} has a line break or another character that cannot be printed\n  do:    leave it out")
