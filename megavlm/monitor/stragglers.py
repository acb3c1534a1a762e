"""Which rank is slow, and why: its packs, its data, or its hardware.

Under ZeRO-3 all ranks wait for each other at every layer, so the time of a step is the same everywhere and says
nothing about a rank. These figures do:

    planned   FLOPs of the rank's packs, relative to the mean of all ranks: shows unequal packs
    data      share of the time that the rank waited for its own loader: shows slow storage, too few workers
    compute   CPU time of forward and backward per planned FLOP, relative to the median (on CPU only: a thread that waits for
              another rank uses none)
    probe     time of a fixed small matrix product, relative to the median: shows throttled or shared hardware
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megavlm.system.files import write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.world import World

HEAVY_PACKS, SLOW_COMPUTE, SLOW_DATA_SHARE = 1.1, 1.3, 0.05


@dataclass(frozen=True)
class RankTimes:
    """What one rank measured since the last report."""

    host: str
    planned_flops: float
    data_wait_s: float
    compute_s: float
    """0 on CUDA, where work cannot be told from waiting."""
    probe_s: float


class Stragglers:
    """Collects the times of one rank. All ranks call ``report`` together.

    Args:
        world: The processes.
        file: Where rank 0 keeps the newest table.
    """

    def __init__(self, world: World, file: Path):
        self.world = world
        self.file = file
        size = 2048 if world.device.type == "cuda" else 192
        self._matrix = torch.ones(size, size, device=world.device)
        self._reset()

    def _reset(self) -> None:
        self.planned_flops = self.data_wait_s = self.compute_s = 0.0
        self._begin_s = time.perf_counter()

    def add_step(self, planned_flops: float, data_wait_s: float, compute_s: float) -> None:
        """Count a step of this rank."""
        self.planned_flops += planned_flops
        self.data_wait_s += data_wait_s
        self.compute_s += compute_s if self.world.device.type == "cpu" else 0.0

    def report(self) -> tuple[dict[str, float], list[str]]:
        """TensorBoard tag → value, and a line for every rank that stands out; rank 0 rewrites the file."""
        seconds = time.perf_counter() - self._begin_s
        mine = RankTimes(os.uname().nodename, self.planned_flops, self.data_wait_s, self.compute_s, self._probe())
        ranks: list[RankTimes] = self.world.gather(mine)
        self._reset()
        table, remarks = judge(ranks, seconds)
        if self.world.is_main:
            with harmless(str(self.file)):
                write_atomically(self.file, "\n".join(table) + "\n")
        probes = np.array([rank.probe_s for rank in ranks])
        waits = np.array([rank.data_wait_s for rank in ranks])
        values = {
            "balance/probe_max_over_median": float(probes.max() / np.median(probes)),
            "balance/data_wait_max_s": float(waits.max()),
        }
        if ranks[0].compute_s:
            compute = np.array([rank.compute_s for rank in ranks])
            values["balance/measured_max_over_mean"] = float(compute.max() / compute.mean())
        return values, remarks

    def _probe(self) -> float:
        """Seconds of one matrix product; the best of five, as something else may run for a moment."""
        best = float("inf")
        for _ in range(5):
            self._synchronize()
            begin = time.perf_counter()
            torch.matmul(self._matrix, self._matrix)
            self._synchronize()
            best = min(best, time.perf_counter() - begin)
        return best

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def judge(ranks: list[RankTimes], seconds: float) -> tuple[list[str], list[str]]:
    """The table as lines of text, and a remark for every rank that slows down the others.

    Args:
        ranks: Measurements, in order of rank.
        seconds: Time between the two reports.
    """
    planned = _relative([rank.planned_flops for rank in ranks], np.mean)
    compute = _relative([rank.compute_s / max(rank.planned_flops, 1.0) for rank in ranks], np.median)
    probe = _relative([rank.probe_s for rank in ranks], np.median)
    waits = np.array([rank.data_wait_s / seconds for rank in ranks])
    table, remarks = [f"{'rank':>5} {'host':<20} {'planned':>8} {'data':>7} {'compute':>8} {'probe':>7}  verdict"], []
    for number, rank in enumerate(ranks):
        reasons = []
        if planned[number] > HEAVY_PACKS:
            reasons.append("heavy packs")
        # all ranks may wait for data equally; the one that waits longer than the others slows them down
        if waits[number] > SLOW_DATA_SHARE and waits[number] > 2 * np.median(waits):
            reasons.append("slow data")
        if max(compute[number], probe[number]) > SLOW_COMPUTE:
            reasons.append("slow hardware")
        verdict = ", ".join(reasons)
        shown = f"{compute[number]:8.2f}" if rank.compute_s else f"{'-':>8}"
        table.append(f"{number:>5} {rank.host:<20} {planned[number]:8.3f} {waits[number]:7.1%} {shown} {probe[number]:7.2f}  {verdict}")
        if reasons:
            remarks.append(f"rank {number} on {rank.host}: {verdict}")
    return table, remarks


def _relative(values: list[float], middle) -> np.ndarray:
    of_ranks = np.asarray(values, np.float64)
    return of_ranks / max(float(middle(of_ranks)), 1e-30)
