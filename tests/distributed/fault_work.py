"""What ranks do when something goes wrong. Functions here are called in other processes, by name."""

import os
import resource
import signal
import time
from functools import partial

import torch

from megavlm.engine import agreement, signals
from megavlm.engine.watchdog import Watchdog
from megavlm.engine.zero_state import group_steps
from megavlm.launch.train import make_trainer
from megavlm.runs.exits import RunEnded
from megavlm.training import trainer as trainer_module
from tests.distributed.work import _watched, listen, weights


def inject_nan(world, config, steps) -> dict:
    """Train to the end; in these steps the last rank's loss is multiplied by NaN in its backward pass."""
    log = listen()
    trainer = make_trainer(config, world)
    record = {"ids": [], "weights": {}, "skipped": [], "ended": "done", "code": 0}
    trainer.loader = _watched(trainer.loader, record)
    mlp = trainer.engine.module.causal_lm.model.layers[0].mlp
    mlp.register_full_backward_hook(
        lambda _module, inputs, _outputs: (
            tuple(g * float("nan") for g in inputs) if trainer.step in steps and world.rank == world.size - 1 else None
        )
    )
    handle = trainer._handle_skipped
    trainer._handle_skipped = lambda bad: (record["skipped"].extend(b.step + 1 for b in bad), handle(bad))
    train_step = trainer.train_step

    def watched_step(step):
        if len(steps) < 3:
            record["weights"][step] = weights(trainer.engine) if step else {}
        return train_step(step)

    trainer.train_step = watched_step
    try:
        trainer.run()
    except RunEnded as end:
        record |= {"ended": end.reason, "code": int(end.code)}
    return record | {"group_steps": group_steps(trainer.engine), "log": log.getvalue()}


def hang(world, config) -> dict:
    """In the third step rank 1's data do not come for a while; the watchdogs may report, but not end the process."""
    log, codes = listen(), []
    trainer_module.Watchdog = partial(Watchdog, end=codes.append, least_budget_s=4.0)
    trainer = make_trainer(config, world)
    trainer.loader = _late(trainer.loader, world.rank, codes)
    trainer.run()
    return {"codes": [int(code) for code in codes], "log": log.getvalue()}


def _late(loader, rank, codes):
    for number, item in enumerate(loader):
        if rank == 1 and number == 2:
            sleep_here(codes)
        yield item


def sleep_here(codes) -> None:
    while not codes:
        time.sleep(0.1)


def stop_by_signal(world, config, name: str) -> dict:
    """Rank 1 gets a signal while it runs the first micro-batch of the third step."""
    signals.listen(end_at_once=lambda: None)
    trainer = make_trainer(config, world)
    packs = []
    forward = trainer.engine.module.forward

    def signalled(pack):
        if trainer.step == 2:
            packs.append(pack)
            if world.rank == 1:
                os.kill(os.getpid(), getattr(signal, name))
        return forward(pack)

    trainer.engine.module.forward = signalled
    try:
        trainer.run()
    except RunEnded as end:
        return {"code": int(end.code), "packs_of_last_step": len(packs)}
    return {"code": 0}


def stop_by_touching(world, config) -> dict:
    """Somebody touches ``save`` during the third step and ``stop`` during the sixth."""
    trainer = make_trainer(config, world)

    def touch(step):
        if world.is_main and step in (2, 5):
            (trainer.folder.path / ("save" if step == 2 else "stop")).touch()
        torch.distributed.barrier()

    try:
        _run(trainer, touch)
    except RunEnded as end:
        return {"code": int(end.code), "step": trainer.step}
    return {"code": 0}


def stop_with_a_full_disk(world, config) -> dict:
    """Somebody touches ``stop`` during the third step, when nothing of more than 20 kB can be written any more."""
    trainer = make_trainer(config, world)

    def fill_and_touch(step):
        if step == 2:
            trainer.checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            (trainer.folder.path / "stop").touch()

    try:
        _run(trainer, fill_and_touch)
    except OSError as error:
        return {"error": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"error": ""}


def _run(trainer, after_step) -> None:
    """Train, with something to be done at the end of every step, and look for touched files at every one."""
    agreement.LOOK_EVERY_S = 0.0
    train_step = trainer.train_step

    def watched_step(step):
        norm = train_step(step)
        after_step(step)
        return norm

    trainer.train_step = watched_step
    trainer.run()
