"""Says where a phase of the route begins: in the log, and as text in TensorBoard. Tested by `tests/observers/test_window.py`."""

import logging

from megavlm.config.timeline import timeline
from megavlm.training.observers import Observer, StepView, Training

log = logging.getLogger(__name__)


class Switches(Observer):
    """Silent in runs of a single phase."""

    name = "say which phase begins"

    def attach(self, training: Training) -> None:
        self.training = training
        lines = timeline(training.parts.config)
        self._lines = dict(zip(training.parts.phases.first_steps, lines)) if len(lines) > 1 else {}

    def before_step(self, step: StepView) -> None:
        if self.training.world.is_main and step.number in self._lines:
            log.info(self._lines[step.number])
            self.training.board.text("phases", self._lines[step.number], step.number + 1)
