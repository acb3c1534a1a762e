"""Trains and judges the arms of a study, one after another or a few at a time. Arms that are done are not repeated.

Tested by `tests/study/test_report.py`.
"""

import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megavlm.config import load_config, save_config
from megavlm.errors import MegavlmError
from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import complete_checkpoints, step_of
from megavlm.study.children import Children
from megavlm.study.spec import Arm
from megavlm.system.files import open_to_write, read_json
from megavlm.system.progress import Progress
from megavlm.system.world import without_place

log = logging.getLogger(__name__)


def is_trained(arm: Arm) -> bool:
    """Whether the last step's checkpoint is there."""
    checkpoints = complete_checkpoints(RunFolder(arm.folder).checkpoints)
    return bool(checkpoints) and step_of(checkpoints[-1]) >= arm.config.optimizer.num_steps


def is_judged(arm: Arm) -> bool:
    """Whether the last step's checkpoint was evaluated."""
    file = RunFolder(arm.folder).evaluation
    if not is_trained(arm) or not file.is_file():
        return False
    try:
        return step_of(Path(read_json(file)["checkpoint"])) >= arm.config.optimizer.num_steps
    except (MegavlmError, KeyError) as error:
        log.warning("%s is damaged, and the arm is judged again: %s", file, error)
        return False


def run_arms(arms: list[Arm], parallel: int, processes: int) -> None:
    """Train and judge the unfinished arms.

    Args:
        arms: The arms of the study.
        parallel: Arms that run at the same time; they share the cores.
        processes: Training processes per arm.

    Raises:
        MegavlmError: If an arm fails, after the others have finished. If a folder holds a run with other settings.
    """
    _refuse_other_settings(arms)
    todo = [arm for arm in arms if not is_judged(arm)]
    threads = max(1, len(os.sched_getaffinity(0)) // (parallel * processes))
    failures, children = [], Children()
    with (
        Progress(f"arms, {parallel} at a time", len(arms), done=len(arms) - len(todo), lines=False) as bar,
        ThreadPoolExecutor(parallel) as pool,
        children.ended_by_signals(pool),
    ):
        running = {pool.submit(_run, arm, processes, threads, children): arm for arm in todo}
        for future in as_completed(running):
            bar.advance()
            log.info("%s: %s (%d of %d arms)", running[future].folder.name, future.result() or "done", bar.done, len(arms))
            failures += [future.result()] if future.result() else []
    if failures:
        raise MegavlmError(
            f"{len(failures)} of {len(arms)} arms failed\n  do:    read their study.log, and start the study again; finished arms stay"
        )


def _refuse_other_settings(arms: list[Arm]) -> None:
    """Refuse runs of an earlier version of the study."""
    for arm in arms:
        recipe = arm.folder / "recipe.yaml"
        if recipe.is_file() and load_config(str(recipe)) != arm.config:
            raise MegavlmError(
                f"{arm.folder} was begun with other settings than the study has now\n"
                "  do:    give the study another study_dir, remove that folder, or set the study as it was"
            )


def _run(arm: Arm, processes: int, threads: int, children: Children) -> str:
    """Train and judge one arm. Returns what went wrong, or an empty string."""
    arm.folder.mkdir(parents=True, exist_ok=True)
    recipe = arm.folder / "recipe.yaml"
    save_config(arm.config, recipe)
    environment = without_place(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    commands = [] if is_trained(arm) else [[*launcher, "-m", "megavlm", "train", str(recipe)]]
    commands.append(["-m", "megavlm", "evaluate", str(arm.folder)])
    with open_to_write(arm.folder / "study.log", "a") as log:
        for command in commands:
            print(time.strftime("%F %T"), *command, file=log, flush=True)
            status = children.run([sys.executable, *command], env=environment, stdout=log, stderr=log)
            if status:
                return f"{command[-2]} ended with status {status}, see {arm.folder / 'study.log'}"
    return ""
