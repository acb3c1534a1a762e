"""The bar of training, on a terminal; elsewhere the lines of the log say as much. Tested by `tests/system/test_progress.py`."""

from megavlm.system.progress import Progress
from megavlm.training.observers import Observer, StepView, Training


class Bar(Observer):
    """Counts steps."""

    name = "bar"

    def attach(self, training: Training) -> None:
        self._num_steps = training.parts.config.optimizer.num_steps
        self._bar: Progress | None = None

    def before_step(self, step: StepView) -> None:
        # here, because the time left is that of this session's steps
        if self._bar is None:
            self._bar = Progress("train", self._num_steps, done=step.number, lines=False)

    def after_step(self, num_steps: int) -> None:
        assert self._bar is not None  # a step was taken
        self._bar.advance()
        if num_steps == self._num_steps:
            self._bar.close()
