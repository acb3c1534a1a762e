"""The instruments that may be on while a run trains: attention allocation and the tasks' gradients, every so many steps.

Neither changes what is trained, bit for bit. Attention is watched inside the ordinary forward pass of a step's first pack on each rank, and
costs no pass of its own; gradients take a forward and a backward pass of the step's packs per task.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils.tensorboard import SummaryWriter

from megavlm.analysis.attention import STATISTICS, AttentionWatch
from megavlm.analysis.gradients import factors_of_tasks, under_zero
from megavlm.config import MonitorConfig
from megavlm.costs import ModelShape
from megavlm.data.pack import Pack
from megavlm.engine.distributed import World
from megavlm.vocabulary import Vocabulary


class Instruments:
    """Called by all ranks together.

    Args:
        settings: The recipe's ``monitor``.
        engine: DeepSpeed's.
        world: The processes.
        vocabulary: The run's.
        seed: The run's.
        writer: TensorBoard's, on rank 0.
    """

    def __init__(
        self, settings: MonitorConfig, engine, world: World, vocabulary: Vocabulary, seed: int, writer: SummaryWriter | None
    ):
        self.settings, self.engine, self.world, self.vocabulary = settings, engine, world, vocabulary
        self.seed, self.writer = seed, writer
        self._watch: AttentionWatch | None = None

    def watch(self, step: int, pack: Pack) -> AbstractContextManager:
        """Around the forward pass of the first pack of a step.

        Args:
            step: Counted from 0.
            pack: On the host.
        """
        if not _is_due(step, self.settings.attention_every_steps):
            return nullcontext()
        shape = ModelShape.of(self.engine.module.causal_lm.config)
        self._watch = AttentionWatch(shape, self.vocabulary, self.seed)
        return self._watch.on(self.engine.module, pack)

    def compare_tasks(
        self, step: int, packs: list[Pack], factor_G: torch.Tensor, labels_t: torch.Tensor, before_pack: Callable[[Pack], None]
    ) -> None:
        """Before the passes of a step: log how the gradients of its tasks lie to each other.

        Args:
            step: Counted from 0.
            packs: Of this rank, on the host.
            factor_G: Of the sums that the backbone gives, as in the step.
            labels_t: Labelled tokens of each task in the step, over all ranks.
            before_pack: Called before each forward pass, as in the step.
        """
        if not _is_due(step, self.settings.geometry_every_steps):
            return
        factors = factors_of_tasks(factor_G, labels_t.cpu().numpy())
        pairs = under_zero(self.engine, self.world, packs, factors, before_pack)
        if self.writer:
            for pair, blocks in pairs.items():
                for block, alignment in blocks.items():
                    self._log(f"geometry_{pair}/cosine/{block}", alignment.cosine, step + 1)
                    self._log(f"geometry_{pair}/interference/{block}", alignment.interference, step + 1)
                    for task, norm in zip(pair.split("_"), alignment.norms):
                        self._log(f"geometry_{pair}/norm_of_{task}/{block}", norm, step + 1)

    def report(self, step: int) -> None:
        """After a step: log where its attention went, if it was watched.

        Args:
            step: Steps taken.
        """
        if self._watch is None:
            return
        self._watch.merge(self.world.sum)
        if self.writer:
            for (task, query), allocation in self._watch.shares().items():
                for statistic, values_L in zip(STATISTICS, allocation.mean_XL):
                    for layer, value in enumerate(values_L):
                        self._log(f"attention_{task}_{query}/{statistic}/layer_{layer:02d}", value, step)
        self._watch = None

    def _log(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):  # or there was nothing to be seen in this layer
            self.writer.add_scalar(tag, value, step)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and (step + 1) % every == 0
