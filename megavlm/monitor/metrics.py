"""Meters of the last few steps, summed on each rank. They are summed over ranks only when they are reported.

Tested by `tests/distributed/test_training.py`.
"""

import time
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from megavlm.costs import BACKWARD_FACTOR
from megavlm.data.pack.pack import Pack
from megavlm.monitor.writers import WriterName
from megavlm.routing.tasks import TASKS
from megavlm.settings import Number, Positive, Settings
from megavlm.system.memory import resident_bytes
from megavlm.system.world import World


class MonitorConfig(Settings):
    """What is reported, and how often."""

    log_every_steps: Positive = 10
    """Steps between lines in the log and points in TensorBoard."""
    writers: list[WriterName] = ["tensorboard"]
    """Who gets the numbers: `tensorboard`, `csv` (`scalars.csv`), `wandb` and `mlflow` (where installed; offline). Pictures and texts go to
    TensorBoard alone."""
    peak_tflops: Annotated[Number, Field(gt=0, le=1e6)] | None = None
    """What one device can do at the precision of the training, in TFLOP/s; utilisation is reported relative to it. By default that of the
    data sheet, where the device is a GPU that `megavlm.monitor.peaks` knows and the precision is bfloat16."""
    sample_every_steps: Positive | None = None
    """Steps between drawings, answers and pictures of the route for TensorBoard and `samples/`. Off by default."""
    sample_prompts: list[str] = []
    """Prompts of these drawings."""
    attention_every_steps: Positive | None = None
    """Steps between reports of where attention goes, by layer and task, in the step's own packs. Off by default."""
    geometry_every_steps: Positive | None = None
    """Steps between comparisons of the tasks' gradients, by block. Off by default. Each task adds a forward and backward pass."""


TOTALS = ("tokens", "samples", "executed_flops", "seconds", "cpu_seconds", *(f"labels_of_{task}" for task in TASKS))
"""Counters over the whole run, restarts included. CPU time is that of all threads of all ranks' processes, without loader workers."""


class Meters:
    """The sums between two reports.

    Args:
        world: The processes.
        sources: Names of the sources, in the recipe's order.
        stages: (first layer, end layer) of every stage.
        recomputed: Share of each stage, and of the output head, that the backward pass computes again.
    """

    def __init__(self, world: World, sources: Sequence[str], stages: Sequence[tuple[int, int]], recomputed: Sequence[float]):
        self.world = world
        self.sources = sources
        self.stages = stages
        self.recomputed = np.array(recomputed)
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self._reset()

    def _reset(self) -> None:
        self.num_steps = 0
        self.loss_sums = torch.zeros(len(self.sources) * len(TASKS), device=self.world.device)
        self.labels = np.zeros(len(self.sources) * len(TASKS))
        self.tokens = self.samples = self.data_wait_s = self.again_flops = 0.0
        self.flops = np.zeros(len(TASKS))
        self.dense_flops = np.zeros(len(TASKS))
        self.kept = np.zeros((len(self.stages), 2))
        self.images = np.zeros(2)
        self.begin_s = time.perf_counter()
        self.begin_cpu_s = time.process_time()

    def add_pack(self, pack: Pack, loss_sums: torch.Tensor) -> None:
        """Count a pack and its sums of cross-entropy per (source, task); nothing is read back from the device."""
        self.loss_sums += loss_sums.detach()
        self.labels += pack.labels
        self.tokens += pack.num_tokens
        self.samples += len(pack.keys)
        self.flops += pack.task_flops.sum(0)
        self.again_flops += float(self.recomputed @ pack.flops)
        self.dense_flops += pack.dense_flops
        self.kept += pack.kept_tokens
        self.images += pack.image_tokens

    def add_step(self, data_wait_s: float) -> None:
        self.num_steps += 1
        self.data_wait_s += data_wait_s

    def state(self) -> dict:
        """This rank's part of the counters, for the checkpoint."""
        seconds = time.perf_counter() - self.begin_s
        return {"sums": np.concatenate(self._parts()).tolist(), "num_steps": self.num_steps, "seconds": seconds}

    def load_state(self, states: list[dict], totals: dict[str, float]) -> None:
        """Continue the counters of the ranks of an earlier session; rank 0 takes over those of all ranks."""
        self.totals |= totals
        first = states[0]
        sums = np.sum([state["sums"] for state in states], axis=0)
        here = self._parts()
        if len(sums) == sum(map(len, here)) - 1:  # a checkpoint from before recomputation was counted
            sums = np.append(sums, 0.0)
        if len(sums) != sum(map(len, here)):  # another policy has other stages: count from 0
            return
        self.num_steps = first["num_steps"]
        self.begin_s = time.perf_counter() - first["seconds"]
        if not self.world.is_main:
            return
        ends = np.cumsum([len(part) for part in here])
        losses, self.labels, kept, self.images, self.flops, self.dense_flops, scalars = np.split(sums, ends[:-1])
        self.loss_sums = torch.tensor(losses, dtype=torch.float32, device=self.world.device)
        self.kept = kept.reshape(self.kept.shape)
        self.tokens, self.samples, self.data_wait_s, cpu_s, self.again_flops = scalars.tolist()
        self.begin_cpu_s = time.process_time() - cpu_s

    def _parts(self) -> list[np.ndarray]:
        scalars = [self.tokens, self.samples, self.data_wait_s, time.process_time() - self.begin_cpu_s, self.again_flops]
        losses = self.loss_sums.double().cpu().numpy()
        parts = [losses, self.labels, self.kept.ravel(), self.images, self.flops, self.dense_flops, scalars]
        return [np.asarray(part, np.float64) for part in parts]

    def report(self) -> dict[str, float]:
        """TensorBoard tag → value over all ranks since the last report. Called by all ranks together."""
        seconds = time.perf_counter() - self.begin_s
        parts = self._parts()
        # one gather for everything: the largest cost of a rank is needed beside the sums
        ranks = np.stack(self.world.gather(np.concatenate(parts)))
        ends = np.cumsum([len(part) for part in parts])
        flops_of_ranks = ranks[:, ends[3] : ends[4]].sum(1)
        losses, labels, kept, images, flops, dense_flops, scalars = np.split(ranks.sum(0), ends[:-1])
        tokens, samples, data_wait_s, cpu_s, again_flops = scalars
        losses, labels = (x.reshape(len(self.sources), len(TASKS)) for x in (losses, labels))
        values = {
            "time/step_s": seconds / self.num_steps,
            "time/data_wait_share": data_wait_s / (seconds * self.world.size),
            "throughput/tokens_per_s": tokens / seconds,
            "throughput/samples_per_s": samples / seconds,
            "throughput/executed_tflops_per_s": (1 + BACKWARD_FACTOR) * flops.sum() / seconds / 1e12,
            "throughput/recomputed_tflops_per_s": again_flops / seconds / 1e12,
            "throughput/dense_equivalent_tflops_per_s": (1 + BACKWARD_FACTOR) * dense_flops.sum() / seconds / 1e12,
            "routing/flops_share": flops.sum() / dense_flops.sum(),
            "balance/planned_max_over_mean": flops_of_ranks.max() / flops_of_ranks.mean(),
        }
        for t, task in enumerate(TASKS):
            if dense_flops[t]:
                values[f"routing/flops_share_of_{task}"] = flops[t] / dense_flops[t]
            if labels[:, t].sum():
                values[f"loss/{task}"] = losses[:, t].sum() / labels[:, t].sum()
            for s, source in enumerate(self.sources):
                if labels[s, t] and len(self.sources) > 1:
                    values[f"loss_by_source/{source}/{task}"] = losses[s, t] / labels[s, t]
        for stage, ((first, end), row) in enumerate(zip(self.stages, kept.reshape(-1, 2))):
            for t, task in enumerate(TASKS[:2]):
                if images[t]:
                    values[f"kept_tokens/{task}/stage_{stage}_layers_{first}-{end - 1}"] = row[t] / images[t]
        counted = (tokens, samples, (1 + BACKWARD_FACTOR) * flops.sum(), seconds, cpu_s, *labels.sum(0))
        for name, value in zip(TOTALS, counted, strict=True):
            self.totals[name] += float(value)
            values[f"totals/{name}"] = self.totals[name]
        values["memory/host_gib"] = resident_bytes() / 2**30
        if self.world.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._reset()
        return values
