"""What ranks do in the tests of the laboratory. Functions here are called in other processes, by name."""

from megavlm.launch.train import make_trainer
from tests.distributed.work import weights


def train_on_each(world, jobs: dict) -> dict:
    """Train on given packs for several (config, packs of each step), one after another; what came out of each.

    ``left`` is what stands in the gradient buffer when the tasks have been compared, and how many passes DeepSpeed counts: anything else
    than zeros it would apply to parameters that get no gradient in the step.
    """
    return {name: _train_on(world, *job) for name, job in jobs.items()}


def _train_on(world, config, packs_of_steps: list) -> dict:
    trainer = make_trainer(config, world)
    trainer.loader = iter([(packs[world.rank :: world.size], {}) for packs in packs_of_steps])
    norms, zero = [], trainer.engine.optimizer
    instruments, left = trainer.observers[0], []
    compare_tasks = instruments.before_step

    def compare_and_look(step):
        compare_tasks(step)
        left.append((float(zero.grad_partitions_flat_buffer.abs().sum()), zero.micro_step_id))

    instruments.before_step = compare_and_look
    for step in range(len(packs_of_steps)):
        norms.append(float(trainer.train_step(step)))
        trainer.step = step + 1
        instruments.after_step(trainer.step)
    trainer.board.close()
    return {"norms": norms, "weights": weights(trainer.engine), "left": left}
