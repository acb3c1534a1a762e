"""What ranks do in the tests. Functions here are called in other processes, by name."""

import io
import logging
import resource
import threading

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megavlm.engine.zero_state import group_steps
from megavlm.launch.train import make_trainer
from megavlm.model.backbone import Backbone
from megavlm.parts import parts as parts_module
from megavlm.runs.ownership import Ownership, Superseded
from megavlm.training import trainer as trainer_module


def weights(engine) -> dict:
    """Parameters and Adam's moments, whole, by name."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    return found


def _trainer(config, world):
    """A trainer whose watchdog rests: it would take all that these processes do for one step. `run_ranks` has a time limit of its own."""
    trainer = make_trainer(config, world)
    trainer.watchdog.stop()
    return trainer


def train(world, config, num_steps: int) -> dict:
    """Train to ``num_steps``, saving as the recipe says; what was seen and what came out."""
    trainer = _trainer(config, world)
    record = {"first": trainer.step, "ids": [], "losses": [], "norms": []}
    if trainer.step:
        record["restored"] = weights(trainer.engine)
    trainer.loader = _watched(trainer.loader, record)
    for step in range(trainer.step, num_steps):
        record["norms"].append(float(trainer.train_step(step)))
        trainer.step = step + 1
        record["losses"].append(trainer.meters.report())
        if trainer.step % config.checkpoint.every_steps == 0:
            trainer.save()
    trainer.checkpointer.close()
    ended = {"weights": weights(trainer.engine), "states": trainer.states, "group_steps": group_steps(trainer.engine)}
    return record | ended


def train_each(world, jobs: dict) -> dict:
    """`train` for several (config, number of steps), one after another in the same processes."""
    return {name: train(world, *job) for name, job in jobs.items()}


def _watched(loader, record):
    for packs, states in loader:
        record["ids"].append([(pack.lane, [tuple(c) for c in pack.coordinates]) for pack in packs])
        yield packs, states


def train_on_each(world, jobs: dict) -> dict:
    """`train_on` for several (config, packs), one after another in the same processes."""
    return {name: train_on(world, *job) for name, job in jobs.items()}


def train_on(world, config, packs_of_steps: list) -> dict:
    """Train on given packs: ``packs_of_steps[step]`` are all packs of a step, dealt to ranks like lanes."""
    trainer = _trainer(config, world)
    trainer.loader = iter([(packs[world.rank :: world.size], {}) for packs in packs_of_steps])
    norms = [float(trainer.train_step(step)) for step in range(len(packs_of_steps))]
    return {"norms": norms, "weights": weights(trainer.engine)}


class WithExtra(Backbone):
    """A backbone with a parameter that only some steps use."""

    use_extra = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = torch.nn.Parameter(torch.full((2, 32), 0.1))

    def forward(self, pack):
        sums = super().forward(pack)
        return sums * (1 + self.extra.sum() ** 2) if self.use_extra else sums


def train_with_extra(world, config, num_steps: int, absent_step: int, forget: bool) -> list[dict]:
    """Train a parameter that ``absent_step`` does not use; its value, moments and learning rate after each step.

    With ``forget`` false, the remedy for DeepSpeed's stale gradients is taken away.
    """
    parts_module.Backbone = WithExtra
    if not forget:
        trainer_module.forget_gradients = lambda engine: None
    trainer = make_trainer(config, world)
    extra, history = trainer.engine.module.extra, []
    for step in range(num_steps):
        trainer.engine.module.use_extra = step != absent_step
        trainer.train_step(step)
        state = {key: safe_get_full_optimizer_state(extra, key).clone() for key in ("exp_avg", "exp_avg_sq")}
        history.append(state | {"value": safe_get_full_fp32_param(extra).clone(), "lr": trainer.learning_rate})
    return history


def listen() -> io.StringIO:
    """What is logged from now on."""
    text = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(text))
    logging.getLogger().setLevel(logging.INFO)
    return text


def restore_and_listen(world, config) -> dict:
    """Start a run; the step it goes on from, and what it says."""
    text = listen()
    trainer = make_trainer(config, world)
    return {"step": trainer.step, "log": text.getvalue()}


def save_with_other_group_steps(world, config) -> dict:
    """Change one group's step counter and save under the next step."""
    trainer = make_trainer(config, world)
    zero = trainer.engine.optimizer
    assert [group["name"] for group in zero.optimizer.param_groups] == ["decay", "no_decay"]
    zero.optimizer.state[zero.fp32_partitioned_groups_flat[1]]["step"].fill_(9)
    trainer.step += 1
    trainer.save()
    trainer.checkpointer.close()
    return group_steps(trainer.engine)


def train_with_a_full_disk(world, config) -> dict:
    """Three steps, each saved; the last rank cannot write files of more than 20 kB during the second save."""
    text = listen()
    trainer = make_trainer(config, world)
    saves = []
    for step in range(3):
        trainer.train_step(step)
        trainer.step = step + 1
        limit = 20_000 if step == 1 and world.rank == world.size - 1 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        trainer.save()
        saves.append(trainer.checkpointer.wait())
    return {"saves": saves, "log": text.getvalue()}


def train_while_writing(world, config) -> dict:
    """Save after one step, with a writer that does nothing before two more steps are done."""
    trainer = make_trainer(config, world)
    may_write, done = threading.Event(), []
    write_files = trainer.checkpointer._write_files

    def slow(*args, **named):
        may_write.wait()
        done.append(trainer.step)
        return write_files(*args, **named)

    trainer.checkpointer._write_files = slow
    trainer.train_step(0)
    trainer.step = 1
    trainer.save()
    then = weights(trainer.engine)
    for step in (1, 2):
        trainer.train_step(step)
        trainer.step = step + 1
    may_write.set()
    trainer.checkpointer.close()
    return {"weights_when_called": then, "steps_done_before_the_write": done[0]}


def save_after_a_newer_start(world, config) -> str:
    """A newer start takes the folder over between a step and its save."""
    trainer = make_trainer(config, world)
    trainer.train_step(0)
    trainer.step = 1
    if world.is_main:
        Ownership(trainer.folder.checkpoints)
    trainer.save()
    try:
        trainer.checkpointer.wait()
    except Superseded as error:
        return str(error)
    return "it was written"
