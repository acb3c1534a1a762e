"""RUN/status.json, kept by rank 0, and the words that `megavlm status` makes of it."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from megavlm.errors import MegavlmError
from megavlm.runs.exits import Exit
from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import complete_checkpoints
from megavlm.system.files import write_atomically

SILENT_S = 300
"""A run that has reported nothing for so long (and three times its usual pace) is called silent."""

ENDED = {
    Exit.DONE: "done",
    Exit.MISTAKE: "ended: the recipe, the data or the run folder is wrong",
    Exit.DIVERGED: "ended: too many skipped steps in a row",
    Exit.SUPERSEDED: "ended: a newer start took over",
    Exit.HUNG: "ended by the watchdog: a step exceeded its budget",
    Exit.INTERRUPTED: "interrupted, to be continued",
    Exit.STOPPED: "stopped on request",
}


def write_status(folder: RunFolder, **entries: Any) -> None:
    """Replace the status of a run; adds who writes it and when."""
    about = {
        "updated": time.time(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }
    write_atomically(folder.status, json.dumps(entries | about, indent=1) + "\n")


def describe_status(run: str | Path) -> str:
    """State, step, pace, time left, last checkpoint, restarts and queue state of a run, a line each."""
    folder = RunFolder(run)
    jobs = folder.path.glob("slurm/*.job")
    job = next((path.read_text().strip() for path in sorted(jobs, reverse=True)), "")
    if not folder.status.exists() and not job:
        raise MegavlmError(f"{run} is not a run folder: it has no status.json\n  do:    train or submit a recipe first")
    status = json.loads(folder.status.read_text()) if folder.status.exists() else {}
    job = status.get("job") or job
    lines = [("state", _state(folder, status))]
    if status:
        lines.append(("step", f"{status['step']} of {status['num_steps']}, {status['world_size']} processes"))
    if status.get("step_s"):
        lines.append(("pace", f"{status['step_s']:.3g} s per step, {status['tokens_per_s']:.0f} tokens/s"))
        left_s = int((status["num_steps"] - status["step"]) * status["step_s"])
        lines.append(("left", f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"))
    if status.get("skipped"):
        lines.append(("skipped steps", f"{status['skipped']}, see {folder.forensics}"))
    checkpoints = complete_checkpoints(folder.checkpoints)
    newest = f"{checkpoints[-1].name}, {_ago(checkpoints[-1].stat().st_mtime)}" if checkpoints else "none"
    lines.append(("last checkpoint", newest))
    if job:
        lines += [("job", job), ("queue", queue_state(job)), ("restarts", str(status.get("restarts", 0)))]
    return "\n".join(f"{name:<16} {value}" for name, value in lines)


def queue_state(job: str) -> str:
    """What SLURM says of a job: its state, and the reason if it waits."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T (%r), nodes %N, time left %L"],
            capture_output=True,
            check=False,
            text=True,
            timeout=20,
        )
    except OSError:
        return "not known: squeue is not installed here"
    return asked.stdout.strip() if asked.returncode == 0 and asked.stdout.strip() else "no longer known to SLURM"


def _state(folder: RunFolder, status: dict[str, Any]) -> str:
    if not status:
        return "submitted, not started yet"
    if folder.exit_code.exists():
        code = int(folder.exit_code.read_text())
        return ENDED[Exit(code)] if code in set(Exit) else f"failed with exit status {code}, see {folder.log_file}"
    silent_s = time.time() - status["updated"]
    if silent_s > max(SILENT_S, 3 * status.get("report_s", 0)):
        return f"running, but silent: last report {_ago(status['updated'])} on {status['host']}"
    return "running"


def _ago(time_s: float) -> str:
    seconds = int(time.time() - time_s)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
