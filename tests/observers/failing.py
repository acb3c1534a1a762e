"""Observers and pictures that fail in real runs. Functions here are called in other processes, by name."""

from megavlm.launch import train as launch
from megavlm.observers import drawings
from megavlm.system import pictures
from megavlm.training.observers import Observer
from tests.distributed.work import listen, weights


class Failing(Observer):
    """Raises on one rank, or on all in the midst of a backward pass."""

    name = "a failing observer"

    def __init__(self, rank: int, when: str):
        self.rank, self.when = rank, when

    def attach(self, training):
        self.is_here = training.world.rank == self.rank
        self.engine, self.factor = training.engine, None

    def before_step(self, step):
        if self.when == "in a backward pass" and step.number == 1:
            step.before_pack(step.packs[0])
            sums_G = self.engine(step.packs[0].to("cpu"))
            self.engine.backward((sums_G * step.factor_G).sum(), scale_wrt_gas=False)
            raise ValueError("all ranks, with gradients left behind")
        if self.when == "before a step" and self.is_here:
            raise ValueError("one rank before a step")

    def after_step(self, num_steps):
        if self.when == "after a step" and self.is_here:
            raise ValueError("one rank after a step")


def run_with(world, jobs: dict) -> dict:
    """Train each config to its end with something that fails; what was said, and the weights."""
    return {name: _run_with(world, *job) for name, job in jobs.items()}


def _run_with(world, config, fault: str) -> dict:
    log = listen()
    trainer = launch.make_trainer(config, world)
    undo = []
    if fault in ("before a step", "after a step", "in a backward pass"):
        trainer.observers = [*trainer.observers, Failing(1, fault)]
        for observer in trainer.observers[-1:]:
            observer.attach(trainer.training)
    elif fault == "in a layer":
        undo.append((drawings, "draw_images", drawings.draw_images))
        drawings.draw_images = _failing_in_a_layer
    elif fault == "in the picture":
        undo.append((pictures.pyplot, "subplots", pictures.pyplot.subplots))
        pictures.pyplot.subplots = _fail
    elif fault == "in the board" and world.is_main:
        trainer.board._file.add = trainer.board._file.close = _fail
    trainer.run()
    for place, name, value in undo:
        setattr(place, name, value)
    return {"log": log.getvalue(), "step": trainer.step, "weights": weights(trainer.engine)}


def _failing_in_a_layer(engine, *args, **options):
    def hook(_module, _inputs):
        raise ValueError("all ranks in the midst of a forward pass")

    handle = engine.module.causal_lm.model.layers[2].mlp.register_forward_pre_hook(hook)
    try:
        return _draw_images(engine, *args, **options)
    finally:
        handle.remove()


_draw_images = drawings.draw_images


def _fail(*_args, **_options):
    raise RuntimeError("no picture today")
