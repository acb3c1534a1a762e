"""`megavlm train` in one process: start, train, and end with a status that says what should happen next.

Tested by `tests/distributed/test_faults.py`.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megavlm.config import RunConfig, load_config, run_dir_of
from megavlm.engine import signals
from megavlm.errors import LostProcess, MegavlmError
from megavlm.runs.exits import Exit, LastWord, NotSaved, RunEnded
from megavlm.system.files import PROJECT, DamagedFile, read_json, write_atomically
from megavlm.system.harmless import harmless

if TYPE_CHECKING:
    from megavlm.system.world import World
    from megavlm.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(recipe: str, overrides: dict[str, Any]) -> None:
    """Train a recipe, or go on with it; ends the process if that is not to end well.

    Raises:
        MegavlmError: For mistakes of the user.
        SystemExit: With the status of `Exit` if the run ends before its last step.
    """
    # a loop on that file must not take an earlier start's word for this one's, even if the recipe is refused
    last_word = LastWord(run_dir_of(recipe, overrides))
    last_word.forget()
    signals.listen(partial(_leave_and_end, last_word, Exit.ABANDONED))
    try:
        config = load_config(recipe, overrides)
        from megavlm.runs.folder import RunFolder
        from megavlm.runs.ownership import Superseded
        from megavlm.system import world as distributed

        folder = RunFolder(config.run_dir)
        world = distributed.start(config.engine.timeout_s)
        logging.getLogger().setLevel(logging.INFO if world.is_main else logging.WARNING)
        try:
            trainer = make_trainer(config, world)
            if world.is_main:
                _keep_environment(folder.environment, world.size)
            trainer.run()
            code, reason = Exit.DONE, ""
        except RunEnded as end:
            code, reason = end.code, end.reason
        except Superseded as error:
            code, reason = Exit.SUPERSEDED, str(error)
        if world.is_main:
            if reason:
                log.warning(reason)
            # a superseded start leaves the folder to the new one
            if code != Exit.SUPERSEDED:
                last_word.leave(code)
        if code == Exit.DONE:
            distributed.stop()
    except LostProcess as error:
        log.error(error)
        _leave_and_end(last_word, Exit.LOST)
    except NotSaved as error:
        log.error(error)
        _leave_and_end(last_word, 1)
    except MegavlmError:
        last_word.leave(Exit.MISTAKE)
        raise
    except Exception as error:
        traceback.print_exc()
        _leave_and_end(last_word, Exit.LOST if is_a_loss(error) else 1)
    if code != Exit.DONE:
        # not by way of the interpreter: that would wait for threads, and a launcher kills the ranks that are last
        _end_at_once(code)


def make_trainer(config: RunConfig, world: "World") -> "Trainer":
    """The trainer of a recipe with everything that watches it. Called by all ranks together.

    Raises:
        MegavlmError: If the recipe, the data or the run folder is wrong.
    """
    from megavlm.data.pack.loader import lanes_of
    from megavlm.engine.deepspeed_file import read_deepspeed_file
    from megavlm.monitor.writers import check_writers
    from megavlm.observers.answers import Answers
    from megavlm.observers.bar import Bar
    from megavlm.observers.drawings import Drawings
    from megavlm.observers.instruments import Instruments
    from megavlm.observers.profile import Profile
    from megavlm.observers.remarks import Remarks
    from megavlm.observers.routes import Routes
    from megavlm.observers.switches import Switches
    from megavlm.observers.validation import Validation
    from megavlm.parts.fitness import check_lanes
    from megavlm.parts.resolve import resolve
    from megavlm.runs.folder import RunFolder
    from megavlm.system.determinism import be_deterministic
    from megavlm.training.trainer import Trainer

    if config.engine.deterministic:
        be_deterministic()
    # before anything is read: the processes may not be able to share the lanes
    lanes_of(world.rank, world.size, config.data.num_lanes)
    check_lanes(config, world.size)
    check_writers(config.monitor.writers)
    read_deepspeed_file(config.engine.deepspeed)
    observers = [Instruments(), Validation(), Drawings(), Answers(), Routes(), Switches(), Remarks(), Bar(), Profile()]
    return Trainer(resolve(config, RunFolder(config.run_dir), world), world, observers)


def is_a_loss(error: Exception) -> bool:
    """Whether an error only says that another process, the network or the device is gone: another start may well go on.

    A device's memory that does not suffice, and an assertion that fails on it, are errors of what was asked of it.
    """
    import torch
    from torch import distributed

    if isinstance(error, torch.OutOfMemoryError) or "device-side assert" in str(error):
        return False
    if isinstance(error, (distributed.DistError, torch.AcceleratorError)):
        return True
    text = "".join(traceback.format_exception(error))
    signs = r"gloo|NCCL|Connection (closed|reset|refused)|CUDA error|CUDA driver error|cuDNN error|CUBLAS_STATUS_|ECC error"
    return isinstance(error, RuntimeError) and bool(re.search(signs, text))


def _leave_and_end(last_word: LastWord, code: int) -> NoReturn:
    """End at once with a status; a rank that had a word before this one keeps it: its neighbours only know that it is gone."""
    last_word.leave(code)
    _end_at_once(code)


def _end_at_once(code: int) -> NoReturn:
    for stream in (*logging.getLogger().handlers, sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)


def _keep_environment(path: Path, world_size: int) -> None:
    """Add this start to RUN/environment.json: what ran, on what, with which versions."""
    import deepspeed
    import torch
    import transformers

    import megavlm

    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": world_size,
        "host": os.uname().nodename,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": sys.version.split()[0],
        "versions": {m.__name__: m.__version__ for m in (megavlm, torch, deepspeed, transformers)},
        "packages": {each.metadata["Name"]: each.version for each in sorted(distributions(), key=lambda each: str(each.metadata["Name"]))},
        "commit": _commit(PROJECT),
        "commit_of_the_working_folder": _commit(Path.cwd()),
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("SLURM_JOB", "SLURM_RESTART", "SLURM_NNODES", "NCCL_", "OMP_NUM", "CUDA_VISIBLE"))
        },
    }
    with harmless(f"the environment of this start {path}"):
        write_atomically(path, json.dumps([*_earlier_starts(path), entry], indent=1))


def _commit(folder: Path) -> str | None:
    """The commit of the git repository that a folder is in, with a `+` if files differ from it; None without git."""
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{'+' * bool(changed)}"


def _earlier_starts(path: Path) -> list:
    try:
        return read_json(path, list) if path.exists() else []
    except DamagedFile as error:
        log.warning("%s: this start writes a new one", error.what)
        return []
