"""RUN/status.json, kept by rank 0, and the words that `megavlm status` makes of it."""

import json
import logging
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from megavlm.errors import MegavlmError
from megavlm.runs.exits import Exit
from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import complete_checkpoints
from megavlm.system.files import DamagedFile, read_json, read_small, write_atomically
from megavlm.system.processes import identity_of, is_alive

log = logging.getLogger(__name__)

SILENT_S = 300
"""A run that has reported nothing for so long (and three times its usual pace) is called silent."""
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
"""States of a SLURM job that runs no more."""

NOT_IN_QUEUE = "no longer known to SLURM"
NUMBERS = ("updated", "pid", "step", "num_steps", "world_size", "step_s", "tokens_per_s", "report_s", "skipped", "restarts")
TEXTS = ("host", "job", "state")
JOB = re.compile(r"(\d[\d_+]*)?")
"""The number of a SLURM job, of a task of an array, or of a part of a job; nothing outside SLURM."""
NEEDED = {"updated", "pid", "host"}
"""What a status always holds; the rest is there from the first step on."""

ENDED = {
    Exit.DONE: "done",
    Exit.MISTAKE: "ended: the recipe, the data or the run folder is wrong",
    Exit.DIVERGED: "ended: too many skipped steps in a row",
    Exit.LOST: "ended: a process, its device or the network failed; to be continued",
    Exit.SUPERSEDED: "ended: a newer start took over",
    Exit.HUNG: "ended by the watchdog: a step exceeded its budget",
    Exit.INTERRUPTED: "interrupted, to be continued",
    Exit.STOPPED: "stopped on request",
    Exit.ABANDONED: "ended by Ctrl-C twice; nothing was saved",
}


def write_status(folder: RunFolder, **entries: Any) -> None:
    """Replace the status of a run; adds who writes it and when."""
    about = {
        "updated": time.time(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "process": identity_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }
    write_atomically(folder.status, json.dumps(entries | about, indent=1) + "\n")


def describe_status(run: str | Path) -> str:
    """State, step, pace, time left, last checkpoint, restarts and queue state of a run, a line each."""
    folder = RunFolder(run)
    job = _submitted_job(folder)
    if not os.path.lexists(folder.status) and not job:
        raise MegavlmError(f"{run} is not a run folder: it has no status.json\n  do:    train or submit a recipe first")
    status, damage = _read_status(folder)
    job = status.get("job") or job
    queue = queue_state(job) if job else ""
    lines = [("state", damage or _state(folder, status, queue))]
    if damage and os.path.lexists(folder.exit_code):
        lines.append(("last start", _ended(folder)))
    if {"step", "num_steps", "world_size"} <= set(status):
        lines.append(("step", f"{status['step']} of {status['num_steps']}, {status['world_size']} processes"))
    if status.get("step_s") and {"step", "num_steps", "tokens_per_s"} <= set(status):
        lines.append(("pace", f"{status['step_s']:.3g} s per step, {status['tokens_per_s']:.0f} tokens/s"))
        left_s = int((status["num_steps"] - status["step"]) * status["step_s"])
        lines.append(("left", f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"))
    if status.get("skipped"):
        lines.append(("skipped steps", f"{status['skipped']}, see {folder.forensics}"))
    checkpoints = complete_checkpoints(folder.checkpoints)
    newest = f"{checkpoints[-1].name}, {_ago(checkpoints[-1].stat().st_mtime)}" if checkpoints else "none"
    lines.append(("last checkpoint", newest))
    if job:
        lines += [("job", job), ("queue", queue), ("restarts", str(status.get("restarts", 0)))]
    return "\n".join(f"{name:<16} {value}" for name, value in lines)


def queue_state(job: str) -> str:
    """What SLURM says of a job: its state, and the reason if it waits."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T (%r), nodes %N, time left %L"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except OSError:
        return "not known: squeue is not installed here"
    except subprocess.TimeoutExpired:
        return "not known: squeue does not answer"
    return asked.stdout.strip() if asked.returncode == 0 and asked.stdout.strip() else NOT_IN_QUEUE


def _submitted_job(folder: RunFolder) -> str:
    """The job that `megavlm submit` wrote down last, or nothing."""
    for path in sorted(folder.path.glob("slurm/*.job"), reverse=True):
        try:
            job = read_small(path).strip()
        except DamagedFile as error:
            log.warning(error.what)
            continue
        if JOB.fullmatch(job):
            return job
        log.warning("%s is damaged: it is no number of a job", path)
    return ""


def _read_status(folder: RunFolder) -> tuple[dict[str, Any], str]:
    """The status, or nothing and what is wrong with it."""
    if not os.path.lexists(folder.status):
        return {}, ""
    try:
        status = read_json(folder.status)
    except DamagedFile as error:
        return {}, f"not known: {error.what}"
    numbers = all(isinstance(status[name], int | float) and abs(status[name]) < 1e15 for name in NUMBERS if name in status)
    texts = all(isinstance(status[name], str) for name in TEXTS if name in status)
    if numbers and texts and set(status) >= NEEDED and JOB.fullmatch(status.get("job", "")):
        return status, ""
    return {}, f"not known: {folder.status} is damaged: it is no status"


def _state(folder: RunFolder, status: dict[str, Any], queue: str) -> str:
    if not status:
        return _ended(folder) if os.path.lexists(folder.exit_code) else "submitted, not started yet"
    if os.path.lexists(folder.exit_code):
        return _ended(folder)
    if status.get("state") == "done":
        return "done"
    last = f"last report {_ago(status['updated'])} on {status['host']}"
    if status["host"] == os.uname().nodename:
        if not is_alive(status["pid"], status.get("process")):
            return f"ended without a word: its process {status['pid']} is gone, {last}; start it again to resume"
    elif queue == NOT_IN_QUEUE or queue.startswith(OVER):
        return f"ended without a word: its job is over, {last}; start it again to resume"
    elif queue.startswith("PENDING"):
        return f"waiting in the queue, {last}"
    elif not queue.startswith("RUNNING"):
        last += ", where its process cannot be seen from here"
    silent_s = time.time() - status["updated"]
    if silent_s > max(SILENT_S, 3 * status.get("report_s", 0)):
        return f"silent: {last}"
    word = "starting" if status.get("state") == "starting" else "running"
    return word if "cannot be seen" not in last else f"{word}, as far as is known: {last}"


def _ended(folder: RunFolder) -> str:
    """What the exit status says."""
    try:
        code = int(read_small(folder.exit_code))
    except DamagedFile as error:
        return f"not known: {error.what}"
    except ValueError:
        return f"not known: {folder.exit_code} is damaged: it holds no exit status"
    return ENDED[Exit(code)] if code in set(Exit) else f"failed with exit status {code}, see {folder.log_file}"


def _ago(time_s: float) -> str:
    seconds = int(time.time() - time_s)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
