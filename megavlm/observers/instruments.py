"""The instruments that may be on while a run trains: attention allocation and the tasks' gradients, every so many steps.

Neither changes what is trained, bit for bit. Attention is watched inside the ordinary forward pass of a step's first pack on each rank, and
costs no pass of its own; gradients take a forward and a backward pass of the step's packs per task.

Letters: G sums that the backbone gives, or key/value heads; L layers, X statistics.
"""

import math
from contextlib import AbstractContextManager, nullcontext

from megavlm.analysis.attention import STATISTICS, Allocation, AttentionWatch
from megavlm.analysis.figures import attention_shares, head_maps
from megavlm.analysis.gradients import factors_of_tasks, under_zero
from megavlm.costs import ModelShape
from megavlm.data.pack.pack import Pack
from megavlm.system.harmless import harmless
from megavlm.training.observers import Observer, StepView, Training


class Instruments(Observer):
    """Attention allocation and the tasks' gradients; the recipe's ``monitor`` says how often."""

    name = "compare tasks"

    def __init__(self) -> None:
        self._watch: AttentionWatch | None = None

    def attach(self, training: Training) -> None:
        self.config = training.parts.config.monitor
        self.engine = training.engine
        self.world = training.world
        self.board = training.board
        self.samples = training.folder.samples
        self.vocabulary = training.parts.vocabulary
        self.seed = training.parts.config.seed

    def before_step(self, step: StepView) -> None:
        """Log how the gradients of the step's tasks agree."""
        if not _is_due(step.number, self.config.geometry_every_steps):
            return
        factors = factors_of_tasks(step.factor_G, step.labels_t.numpy())
        pairs = under_zero(self.engine, self.world, step.packs, factors, before_pack=step.before_pack)
        for pair, blocks in pairs.items():
            for block, alignment in blocks.items():
                self._log(f"geometry_{pair}/cosine/{block}", alignment.cosine, step.number + 1)
                self._log(f"geometry_{pair}/interference/{block}", alignment.interference, step.number + 1)
                for task, norm in zip(pair.split("_"), alignment.norms, strict=True):
                    self._log(f"geometry_{pair}/norm_of_{task}/{block}", norm, step.number + 1)

    def around_pack(self, step: int, number: int, pack: Pack) -> AbstractContextManager:
        """Watch the attention of a step's first pack."""
        if number or not _is_due(step, self.config.attention_every_steps):
            return nullcontext()
        shape = ModelShape.of(self.engine.module.causal_lm.config)
        self._watch = AttentionWatch(shape, self.vocabulary, self.seed)
        return self._watch.on(self.engine.module, pack)

    def after_step(self, num_steps: int) -> None:
        """Log where the step's attention went, if it was watched."""
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.merge(self.world.sum)
        shares = watch.shares()
        if self.world.is_main and shares:
            self._show(shares, num_steps)
        for (task, query), allocation in shares.items():
            for statistic, values_L in zip(STATISTICS, allocation.mean_XL, strict=True):
                for layer, value in enumerate(values_L):
                    self._log(f"attention_{task}_{query}/{statistic}/layer_{layer:02d}", value, num_steps)

    def _show(self, shares: dict[tuple[str, str], Allocation], num_steps: int) -> None:
        """The same as pictures: shares by layer, and attention on images by layer and head."""
        for name, draw in (("shares", attention_shares), ("heads", head_maps)):
            path = self.samples / f"attention-{name}-{num_steps:08d}.png"
            with harmless(f"the picture {path}"):
                self.board.picture(f"attention/{name}", draw(shares, path), num_steps)

    def _log(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):  # NaN where no row of this layer was looked at
            self.board.scalars({tag: value}, step)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and (step + 1) % every == 0
