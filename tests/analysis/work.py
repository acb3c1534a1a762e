"""What ranks do in the tests of the laboratory. Functions here are called in other processes, by name."""

from megavlm.engine.trainer import Trainer
from tests.distributed.work import weights


def train_on_each(world, jobs: dict) -> dict:
    """Train on given packs for several (config, packs of each step), one after another; what came out of each."""
    return {name: _train_on(world, *job) for name, job in jobs.items()}


def _train_on(world, config, packs_of_steps: list) -> dict:
    trainer = Trainer(config, world)
    trainer.loader = iter([(packs[world.rank :: world.size], {}) for packs in packs_of_steps])
    norms = []
    for step in range(len(packs_of_steps)):
        norms.append(float(trainer.train_step(step)))
        trainer.step = step + 1
        trainer.instruments.report(trainer.step)
    if trainer.writer:
        trainer.writer.close()
    return {"norms": norms, "weights": weights(trainer.engine)}


def compare_and_look(world, config, packs: list) -> dict:
    """The state that a comparison of the tasks between two steps leaves behind."""
    trainer = Trainer(config, world)
    mine = packs[world.rank :: world.size]
    totals = trainer._loss_totals(mine)
    trainer.instruments.compare_tasks(0, mine, trainer._loss_factors(totals), totals[:3], trainer._seed_modules)
    zero = trainer.engine.optimizer
    return {"left": float(zero.grad_partitions_flat_buffer.abs().sum()), "micro_steps": (zero.micro_step_id, trainer.engine.micro_steps)}
