"""All sections, each in a process of its own with a limit of time, and what follows from them.

Tested by `tests/tools/test_gpu_check.py`.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.gpu.child import ANEW, DONE, OUT_OF_TIME
from tools.gpu.record import MOST_TRIES, ROOT, Record
from tools.gpu.summary import write_summary

LIMITS_S = {"go": 300, "parity": 300, "sync": 180, "engine": 240, "ceilings": 90, "mfu": 660, "profile": 120, "study": 500}
"""Section → seconds over all calls, in the order in which they run; together under 40 minutes."""
RESERVE_S = 10.0
"""Of a call, to end in order."""
PASSED, FAILED, NO_GO, UNFINISHED = 0, 1, 3, 4
"""Exit statuses."""


@dataclass
class Check:
    """A call of `tools/gpu_check.py`.

    Args:
        path: The JSON.
        device: cuda or cpu.
        deadline: `time.monotonic` at which the call must be over.
        pattern: Only items whose names match.
    """

    path: Path
    device: str
    deadline: float
    pattern: str = "*"

    def run(self, sections: list[str], anyway: bool) -> int:
        """Run what is left of these sections.

        Args:
            sections: Names, in any order.
            anyway: Go on even if the first section says that it is not worth it.
        """
        for name in [name for name in LIMITS_S if name in sections]:
            complete = self._section(name)
            write_summary(self.path)
            if name == "go" and Record(self.path).failures("go"):
                print("NO-GO: " + "; ".join(Record(self.path).failures("go")), flush=True)
                if not anyway:
                    return NO_GO
            elif name == "go" and complete:
                print("GO", flush=True)
            if not complete:
                print("out of time: give the same command again, with this JSON, to go on", flush=True)
                return UNFINISHED
        record = Record(self.path)
        return FAILED if any(record.failures(name) for name in sections) else PASSED

    def _left(self) -> float:
        return self.deadline - RESERVE_S - time.monotonic()

    def _section(self, name: str) -> bool:
        """Whether the section is complete; its limit may have made it so."""
        while True:
            record = Record(self.path)
            for item in record.running(name):  # of a call that was ended from outside
                if record.items(name)[item]["tries"] >= MOST_TRIES:
                    record.end(name, item, failures=[f"ended its process {MOST_TRIES} times"])
            of_section = LIMITS_S[name] - record.section(name)["seconds"]
            if of_section <= 0:
                return True
            if self._left() <= 0:
                return False
            status, seconds, output = self._child(name, min(of_section, self._left()))
            record = Record(self.path)
            record.section(name)["seconds"] = round(record.section(name)["seconds"] + seconds, 1)
            record.write()
            if status == DONE:
                return True
            if status in (None, OUT_OF_TIME):  # of the section, or of the call
                if record.section(name)["seconds"] < LIMITS_S[name] - RESERVE_S:
                    return False
                for item in record.running(name):
                    record.end(name, item, failures=["ran past the section's limit of time"])
                record.section(name)["seconds"] = float(LIMITS_S[name])
                record.section(name)["out_of_time"] = True
                record.write()
                return True
            if status == ANEW:
                continue
            died = record.running(name) or ["start"]
            for item in died:
                record.end(name, item, failures=[f"its process ended with status {status}"], output=output[-8000:])
            if died == ["start"]:
                return True

    def _child(self, section: str, seconds: float) -> tuple[int | None, float, str]:
        """Exit status (None if it was ended), seconds and the end of what it said."""
        begin = time.monotonic()
        log = self.path.parent / f"{section}.log"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "tools.gpu.child", str(self.path), section, self.device, str(seconds), self.pattern]
        print(f"{time.strftime('%T')} {section}, at most {seconds:.0f} s", flush=True)
        with log.open("a") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                status = None
            except BaseException:  # Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return status, time.monotonic() - begin, log.read_text(errors="replace")
