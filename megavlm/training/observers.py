"""The protocol of those who watch training without the trainer knowing them: instruments, drawings, validation.

An observer is handed to the `Trainer` and called by all ranks together. It must not change what is trained. It calls the same
collectives on every rank; what one rank does alone, such as writing, it does in `megavlm.system.harmless`.

Letters: G sums that the backbone gives, t tasks. Tested by `tests/observers/test_instruments.py`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from megavlm.data.pack.pack import Pack
from megavlm.engine.protocol import Engine
from megavlm.engine.watchdog import Watchdog
from megavlm.engine.zero import begin_anew
from megavlm.monitor.board import Board
from megavlm.parts.parts import Parts
from megavlm.runs.folder import RunFolder
from megavlm.system.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What an observer may use of a run."""

    parts: Parts
    world: World
    engine: Engine
    folder: RunFolder
    board: Board
    watchdog: Watchdog
    metrics: dict[str, float] = field(default_factory=dict)
    """What an observer found after this step, the same on all ranks; a checkpoint of the step keeps it beside the last report."""


@dataclass(frozen=True)
class StepView:
    """A step that is about to be taken."""

    number: int
    """Counted from 0."""
    packs: list[Pack]
    """Packs of this rank, on the host."""
    factor_G: torch.Tensor
    """What each of the sums that the backbone gives is multiplied by."""
    labels_t: torch.Tensor
    """Labelled tokens of each task in the step, over all ranks; on the host."""
    before_pack: Callable[[Pack], None]
    """Called before each forward pass of the step."""


class Observer:
    """Does nothing; a subclass overrides what it needs."""

    name = "observer"
    """What the watchdog says while it works."""

    def attach(self, training: Training) -> None:
        """Called once, before the first step; keep what is needed of it."""

    def before_step(self, step: StepView) -> None:
        """Called before the first forward pass of a step."""

    def around_pack(self, step: int, number: int, pack: Pack) -> AbstractContextManager:
        """A context around the forward pass of each pack.

        Args:
            step: Counted from 0.
            number: Number of the pack among this rank's packs in the step.
            pack: On the host.
        """
        return nullcontext()

    def after_step(self, num_steps: int) -> None:
        """Called after every step.

        Args:
            num_steps: Steps taken.
        """


@contextmanager
def unharmed(observer: Observer, engine: Engine) -> Iterator[None]:
    """An observer's error is a remark on its rank, and training continues.

    An error that came on all ranks, or on one alone outside collectives, has no other consequence. A rank that left a collective in which
    the others wait is found by the watchdog.
    """
    try:
        yield
    except Exception:
        log.exception("%s failed, and is left out in this step", observer.name)
        # it may have been in the midst of a backward pass of its own
        begin_anew(engine)
