"""A run on a disk that becomes full and has room again. Functions here are called in other processes, by name."""

import shutil
from pathlib import Path

from megavlm.engine import agreement
from megavlm.engine.guard import BadStep
from megavlm.launch import train as launch
from megavlm.monitor.tags import is_tag
from megavlm.runs.exits import LastWord
from megavlm.runs.manifest import complete_checkpoints, read_manifest
from tests.distributed.work import listen, weights
from tests.system.full_disk import fill


def train_through_a_full_disk(world, config, disk: str | None) -> dict:
    """Train to the end, saving, reporting and drawing at every step; with a disk, it is really full during steps 3 and 4."""
    agreement.LOOK_EVERY_S = 0.0
    log = listen()
    trainer = launch.make_trainer(config, world)
    launch._keep_environment(trainer.folder.environment, world.size)
    train_step, seen = trainer.train_step, {}

    def watched_step(step):
        norm = train_step(step)
        trainer.checkpointer.wait()
        if disk and step == 2:
            seen["filling"] = fill(Path(disk))
            # what else is written in a bad hour
            launch._keep_environment(trainer.folder.environment, world.size)
            LastWord(config.run_dir).leave(1)
            trainer.guard.settle = _one_bad_step(trainer.guard.settle, step)
        if disk and step == 4:
            seen["newest"] = complete_checkpoints(trainer.folder.checkpoints)[-1].name
            seen["filling"].unlink()
        return norm

    trainer.train_step = watched_step
    trainer.run()
    newest = complete_checkpoints(trainer.folder.checkpoints)[-1]
    unknown = [tag for tag in read_manifest(newest)["metrics"] if not is_tag(tag, config.data.sources)]
    shutil.rmtree(trainer.folder.tensorboard, ignore_errors=True)
    return {"log": log.getvalue(), "weights": weights(trainer.engine), "newest": seen.get("newest"), "unknown_tags": unknown}


def _one_bad_step(settle, step):
    pending = [BadStep(step, float("nan"), float("nan"), "not finite", (1e-3, []))]

    def settle_with_one_more(keep):
        skipped, pending[:] = [*settle(keep=keep), *pending], []
        return skipped

    return settle_with_one_more
