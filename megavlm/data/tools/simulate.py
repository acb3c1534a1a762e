"""How equal will the packs be? The real packer for N lanes over a length mixture and a route, without images, text or a model.

Two rivals run on the same streams of samples: *first-come* (fill the pack in order until the next sample does not fit) and
*first-fit* (of the look-ahead, oldest first, take what still fits). Both look at tokens only, as packers do that do not know costs.

Under ZeRO-3 ranks wait for each other at every layer, so a step takes as long as the sum over the stages of the slowest lane's cost
("stages' maxima summed"), relative to the mean total cost of a lane; 1.0 is perfect.

Tested by `tests/data/pack/test_packer.py`.
"""

import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megavlm.costs import ModelShape
from megavlm.data.pack.config import DataConfig, Mixture, SourceMixture
from megavlm.data.pack.encode import Layout
from megavlm.data.pack.mixture import pack_bounds, pack_sizes, target_flops, token_shares
from megavlm.data.pack.pack import Costing
from megavlm.data.pack.packer import choose
from megavlm.data.read.source import SourceConfig
from megavlm.errors import ConfigError
from megavlm.randomness import Purpose, stream
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense, LayerPlan, Policy
from megavlm.routing.tasks import Task
from megavlm.system.files import write_atomically
from megavlm.system.progress import progress

PACKERS = ("megavlm", "first_fit", "first_come")

SHAPE_7B = ModelShape(
    width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_width=128, mlp_width=18944, vocabulary_size=152_064 + 8_192
)
"""Qwen2.5-7B with a codebook of 8,192 image codes."""


class KeepAfter(Policy):
    """A share of the image tokens stays after a layer: the route of the standard mixture."""

    policy: str = "keep_after"
    after_layer: int
    keep_ratio: float

    def layers(self, num_layers: int) -> list[LayerPlan]:
        return [LayerPlan()] * self.after_layer + [LayerPlan(self.keep_ratio)] * (num_layers - self.after_layer)


def standard_mixture(num_samples: int = 4096, seed: int = 0) -> Mixture:
    """The default mixture: half understanding, half generation.

    Understanding reads one image of 256 to 2,304 tokens (a square of 16 to 48 codes a side, uniform), generation draws one of 256 or 1,024.
    Text is log-normal with a median of 67 tokens and sigma 0.8, at most 2,000; in understanding half of it is the answer.
    """
    rng = stream(seed, Purpose.SYNTHETIC)
    texts = np.clip(rng.lognormal(np.log(67), 0.8, (2, num_samples)), 4, 2000).astype(int).tolist()
    sides = rng.integers(16, 49, num_samples).tolist()
    drawn = rng.choice([256, 1024], num_samples).tolist()
    # <bos> <boi> <eoi> <eos>; the last two of them have a loss where the image has one
    read = [Layout(side**2 + text + 4, text // 2 + 1, 0, ((side**2, Task.UNDERSTANDING),)) for side, text in zip(sides, texts[0])]
    draw = [Layout(image + text + 4, image + 3, text + 1, ((image, Task.GENERATION),)) for image, text in zip(drawn, texts[1])]
    return {
        name: SourceMixture(num_samples=None, layouts=[(1, layout) for layout in layouts])
        for name, layouts in (("understanding", read), ("generation", draw))
    }


@dataclass(frozen=True)
class Situation:
    """What is simulated.

    Args:
        mixture: Layouts per source; lanes draw from them with replacement.
        costing: The route and the model's shape.
        config: How packs are built.
        seed: Seed of the streams.
        at_step: The step of the run whose route is taken.
    """

    mixture: Mixture
    costing: Costing
    config: DataConfig
    seed: int = 0
    at_step: int = 0


def standard(seed: int = 0) -> Situation:
    """The default: `standard_mixture`, a quarter of understanding's image tokens after layer 8 of 28, packs of 8,192 tokens."""
    sources = {name: SourceConfig(shards="none") for name in ("understanding", "generation")}
    phases = Phases.always(KeepAfter(after_layer=8, keep_ratio=0.25), Dense(), SHAPE_7B.num_layers)
    return Situation(standard_mixture(), Costing(phases, SHAPE_7B), DataConfig(sources=sources), seed)


class LaneRecord(NamedTuple):
    """One lane under one packer."""

    costs_sc: np.ndarray
    """FLOPs ``[steps, stages + 1]``; the last entry is the output head."""
    tokens_s: np.ndarray
    longest_wait_packs: int
    pack_ms: float
    """Mean processor time of choosing a pack."""


def simulate_lane(situation: Situation, number: int, num_steps: int, packer: str) -> LaneRecord:
    """Run one lane for ``num_steps`` packs."""
    config, costing = situation.config, situation.costing
    shares = token_shares(situation.mixture, config)
    sources = [
        ([layout for count, layout in source.layouts for _ in range(count)], source.mean_tokens) for source in situation.mixture.values()
    ]
    rng = stream(situation.seed, Purpose.SYNTHETIC, number, 1)
    passes = rng.random(len(shares)) * max(mean for _, mean in sources) / shares
    look_ahead = config.look_ahead_samples
    waiting, costs, tokens, since = [], [], [], []
    costs_sc, tokens_s, longest, elapsed_s = [], [], 0, 0.0
    target = target_flops(situation.mixture, shares, costing, config, step=situation.at_step)
    bounds = pack_bounds(config, costing)
    for step in range(num_steps):
        while len(waiting) < look_ahead:
            number_of_source = int(np.argmin(passes))
            layouts = sources[number_of_source][0]
            layout = layouts[int(rng.integers(len(layouts)))]
            passes[number_of_source] += layout.num_tokens / shares[number_of_source]
            waiting.append(layout)
            costs.append(costing.flops(layout, situation.at_step))
            tokens.append(layout.num_tokens)
            since.append(step)
        begin = time.thread_time()
        if packer == "megavlm":
            packing = stream(situation.seed, Purpose.PACKING, number, step)
            sizes = pack_sizes(waiting, config, costing, situation.at_step)
            chosen = choose(np.array(costs), sizes, target, bounds, rng=packing)
        else:
            chosen = _fill_in_order(tokens, config.pack_tokens, skip=packer == "first_fit")
        elapsed_s += time.thread_time() - begin
        costs_sc.append(np.sum([costs[i] for i in chosen], axis=0))
        tokens_s.append(sum(tokens[i] for i in chosen))
        longest = max(longest, *(step - since[i] for i in chosen))
        taken = set(chosen)
        waiting, costs, tokens, since = (
            [value for i, value in enumerate(values) if i not in taken] for values in (waiting, costs, tokens, since)
        )
    # what waits at the end has waited too
    longest = max([longest, *(num_steps - 1 - begin for begin in since)])
    return LaneRecord(np.array(costs_sc), np.array(tokens_s), longest, 1e3 * elapsed_s / num_steps)


def _fill_in_order(tokens: list[int], max_tokens: int, skip: bool) -> list[int]:
    chosen, room = [], max_tokens
    for i, length in enumerate(tokens):
        if length <= room:
            chosen.append(i)
            room -= length
        elif not skip:
            break
    return chosen


def _simulated(job: tuple[Situation, int, int, str]) -> LaneRecord:
    return simulate_lane(*job)


def simulate(situation: Situation, num_lanes: int, num_steps: int = 400, first_step: int = 200, *, num_processes: int = 1) -> dict:
    """Run all packers on all lanes and compare the steps from ``first_step`` on, when leftovers have gathered.

    Returns:
        Per packer: ``total`` and per-stage max/mean over lanes (``mean`` and ``worst`` over steps), ``stages_summed``, ``token_use``,
        ``longest_wait_packs``, ``pack_ms``; and under ``totals`` every lane's total cost relative to the mean (for the figure).
    """
    if not 0 <= first_step < num_steps:
        raise ConfigError(f"there are no steps from {first_step} to {num_steps}\n  do:    give more --steps")
    result = {}
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for packer in PACKERS:
            jobs = [(situation, lane, num_steps, packer) for lane in range(num_lanes)]
            done = pool.imap(_simulated, jobs, chunksize=max(1, num_lanes // (8 * num_processes)))
            records = list(progress(done, f"simulate {packer}", num_lanes))
            result[packer] = _summary(records, first_step, situation)
    return result


def _summary(records: list[LaneRecord], first_step: int, situation: Situation) -> dict:
    costs_lsc = np.stack([record.costs_sc for record in records])[:, first_step:]
    tokens_ls = np.stack([record.tokens_s for record in records])[:, first_step:]
    totals_ls = costs_lsc.sum(2)
    bounds = situation.costing.phases.bounds
    names = [*(f"layers {first}-{end - 1}" for first, end in bounds), "output head"]
    used = costs_lsc.sum((0, 1)) > 0
    with np.errstate(invalid="ignore"):
        stages_sc = costs_lsc.max(0) / costs_lsc.mean(0)
    summed_s = costs_lsc.max(0).sum(1) / totals_ls.mean(0)
    summed_without_head_s = costs_lsc[..., :-1].max(0).sum(1) / costs_lsc[..., :-1].sum(2).mean(0)
    return {
        "total": _mean_and_worst(totals_ls.max(0) / totals_ls.mean(0)),
        "stages": {name: _mean_and_worst(stages_sc[:, c]) for c, name in enumerate(names) if used[c]},
        "stages_summed": _mean_and_worst(summed_s),
        "stages_summed_without_head": _mean_and_worst(summed_without_head_s),
        "token_use": float(tokens_ls.mean() / situation.config.pack_tokens),
        "longest_wait_packs": max(record.longest_wait_packs for record in records),
        "pack_ms": float(np.mean([record.pack_ms for record in records])),
        "totals": (totals_ls / totals_ls.mean(0)).round(5),
    }


def _mean_and_worst(values_s: np.ndarray) -> dict[str, float]:
    return {"mean": round(float(values_s.mean()), 5), "worst": round(float(values_s.max()), 5)}


def report(result: dict, out: Path, title: str) -> dict:
    """Write the figure ``out`` (PNG) and the figures beside it (JSON); returns the latter."""
    from megavlm.system.pictures import plain, pyplot, save_figure

    figure, (spread, bars) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    labels = {"megavlm": "megavlm", "first_fit": "first fit", "first_come": "first come"}
    edges = np.linspace(0.6, 1.4, 161)
    for color, (packer, label) in zip(("C0", "C1", "C2"), labels.items()):
        spread.hist(result[packer]["totals"].ravel(), edges, histtype="step", color=color, label=label, log=True)
    spread.set(xlabel="cost of a lane's pack / mean over lanes", ylabel="packs", title="spread of the total cost")
    spread.legend()
    places = np.arange(2 + len(result["megavlm"]["stages"]))
    for k, (packer, label) in enumerate(labels.items()):
        entries = [result[packer][name] for name in ("stages_summed", "total")] + list(result[packer]["stages"].values())
        heights = np.array([entry["mean"] for entry in entries])
        worst = np.array([entry["worst"] for entry in entries])
        drawn = bars.bar(places + 0.27 * (k - 1), heights - 1, 0.25, bottom=1, label=label, yerr=[0 * worst, worst - heights])
        bars.bar_label(drawn, [f"{height:.3f}" for height in heights], fontsize=6, padding=1)
    bars.set_xticks(places, ["stages' maxima\nsummed", "total", *result["megavlm"]["stages"]], fontsize=8)
    bars.set(ylabel="max / mean over lanes", title="waiting: mean over steps, line to the worst step")
    bars.legend()
    figure.suptitle(plain(title, width=120))
    save_figure(figure, out)
    numbers = {packer: {k: v for k, v in values.items() if k != "totals"} for packer, values in result.items()}
    write_atomically(out.with_suffix(".json"), json.dumps({"title": title, **numbers}, indent=1))
    return numbers
