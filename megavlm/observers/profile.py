"""`--profile`: a trace of chosen steps on chosen ranks, in ``RUN/profile/``, and in the log a table of where the time went.

    step-00000003-rank-0.json.gz    for chrome://tracing or ui.perfetto.dev
    step-00000003-rank-0.txt        the table

A trace begins where the observers of the step before end, so it holds the wait for data, the step, its report and its drawings. The first
step of a start begins after its data.
"""

import logging
from contextlib import ExitStack

import torch
from torch.profiler import ProfilerActivity, profile

from megavlm.errors import ConfigError
from megavlm.monitor.phases import Phases
from megavlm.system.files import write_atomically
from megavlm.system.harmless import harmless
from megavlm.training.observers import Observer, StepView, Training

log = logging.getLogger(__name__)


class Profile(Observer):
    """Traces the steps that the recipe's ``profile`` names."""

    name = "profile"

    def __init__(self) -> None:
        self._steps: set[int] | None = None
        self._running: ExitStack | None = None

    def attach(self, training: Training) -> None:
        self.training = training
        self.config = training.parts.config.profile
        size = training.world.size
        if self.config.enabled and max(self.config.ranks) >= size:
            raise ConfigError(
                f"profile.ranks: there is no rank {max(self.config.ranks)} among {size} processes\n"
                f"  do:    give numbers from 0 to {size - 1}"
            )

    def before_step(self, step: StepView) -> None:
        if self._steps is None:
            self._steps = self._chosen(step.number)
            if step.number + 1 in self._steps:
                self._begin()

    def after_step(self, num_steps: int) -> None:
        assert self._steps is not None  # a step begins before it ends
        if num_steps in self._steps:
            self._end(num_steps)
        if num_steps + 1 in self._steps:
            self._begin()

    def _chosen(self, done: int) -> set[int]:
        """Numbers of the steps to trace, where ``done`` steps were taken before this start."""
        if not self.config.enabled:
            return set()
        if self.config.steps is None:
            last = self.training.parts.config.optimizer.num_steps
            return {min(done + 3, last), min(done + 4, last)}
        if max(self.config.steps) <= done:
            log.warning("profile.steps: this start goes on after step %d, so none of %s is traced", done, self.config.steps)
        return {step for step in self.config.steps if step > done}

    def _begin(self) -> None:
        if self.training.world.rank not in self.config.ranks:
            return
        device, listeners = self.training.world.device, self.training.watchdog.listeners
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with ExitStack() as stack:
            self._trace = stack.enter_context(profile(activities=activities))
            self._phases = Phases(device)
            stack.callback(self._phases.leave)
            stack.enter_context(self._phases.waits_counted())
            listeners.append(self._phases.enter)
            stack.callback(listeners.remove, self._phases.enter)
            self._running = stack.pop_all()

    def _end(self, step: int) -> None:
        """Write the trace and the table; rank 0 logs the tables of all ranks."""
        table = None
        if self._running:
            running, self._running = self._running, None
            running.close()
            rank, folder = self.training.world.rank, self.training.folder.profile
            table = self._phases.table(f"where step {step} went on rank {rank}") + _kernels_of_collectives(self._trace)
            with harmless(f"the trace of step {step}"):
                folder.mkdir(parents=True, exist_ok=True)
                self._trace.export_chrome_trace(str(folder / f"step-{step:08d}-rank-{rank}.json.gz"))
                write_atomically(folder / f"step-{step:08d}-rank-{rank}.txt", table + "\n")
        for found in self.training.world.gather(table):
            if found and self.training.world.is_main:
                log.info(found)


def _kernels_of_collectives(trace: profile) -> str:
    """Time of NCCL's kernels, which run beside the rest; nothing on a CPU, where waiting says it all."""
    if not torch.cuda.is_available():
        return ""
    microseconds = sum(event.self_device_time_total for event in trace.key_averages() if event.key.startswith("nccl"))
    return f"\n  kernels of collectives, beside the rest: {microseconds / 1e6:.4f} s"
