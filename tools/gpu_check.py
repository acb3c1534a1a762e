#!/usr/bin/env python
"""Everything that has to be proven on a real GPU, in one command that goes on where it stopped.

    python tools/gpu_check.py --minutes 9.5               # writes runs/gpu_check/check.json and summary.md; again to go on
    python tools/gpu_check.py --device cpu --minutes 30   # the same code with small sizes, as far as a CPU goes

Sections: go, parity, sync, engine, ceilings, mfu, profile, study; tools/gpu/README.md says what each proves. Each has a limit of time and
a process of its own. What fails says why, in the JSON, and the others still run. If *go* fails, nothing else runs unless --anyway is given.

Exit status: 0 everything passed, 1 something failed, 3 *go* failed, 4 there was no time for everything.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.gpu.record import Record
from tools.gpu.runner import LIMITS_S, Check


def main(arguments: list[str]) -> int:
    """Run the check.

    Args:
        arguments: Of the command line.

    Returns:
        The exit status.
    """
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=40.0, help="stop by itself within so many minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder of check.json, summary.md, logs and traces")
    parser.add_argument("--only", default=",".join(LIMITS_S), help="sections, separated by commas")
    parser.add_argument("--items", default="*", help="only items whose names match this pattern")
    parser.add_argument("--again", default="", help="sections whose outcomes are forgotten first")
    parser.add_argument("--anyway", action="store_true", help="go on even if the section go fails")
    given = parser.parse_args(arguments)
    only = given.only.split(",")
    again = [name for name in given.again.split(",") if name]
    if unknown := [name for name in [*only, *again] if name not in LIMITS_S]:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(LIMITS_S)}")
    record = Record(given.out.resolve() / "check.json")
    if record.device not in (None, given.device):
        parser.error(f"{record.path} is of device {record.device}: give another --out")
    for name in again:
        record.forget(name)
    record.begin_session(given.device, given.minutes)
    status = Check(record.path, given.device, begin + 60 * given.minutes, given.items).run(only, given.anyway)
    print((record.path.parent / "summary.md").read_text())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
