"""The figures of `megavlm analyze`. Tested by `tests/analysis/test_report.py`. Letters: L layers, G key/value heads, X statistics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.analysis.attention import Allocation
from megavlm.analysis.gradients import PARTS
from megavlm.analysis.probe import Away, Candidate
from megavlm.analysis.rows import KINDS
from megavlm.routing.policies import LateDrop
from megavlm.system.pictures import pyplot, save_figure

KEYS = {"text": "text", "image": "image", "special": "special tokens", "sink": "first token (sink)"}
COLOURS = {"text": "#4C72B0", "image": "#DD8452", "special": "#8C8C8C", "sink": "#C9B458"}
SIDES = {"understanding": "#4C72B0", "generation": "#DD8452"}
MOST_TICKS = 16


CYCLE = [f"C{i}" for i in range(10)]
"""Matplotlib's ten."""


def attention_shares(shares: dict[tuple[str, str], Allocation], path: Path) -> Path:
    """A column per task and kind of query. Above: the shares by layer, stacked. Below: over how many tokens the attention spreads."""
    figure, axes = pyplot.subplots(
        2, len(shares), figsize=(3.6 * len(shares), 6), squeeze=False, layout="constrained", height_ratios=[2, 1], sharey="row"
    )
    for (top, below), ((task, query), allocation) in zip(axes.T, shares.items()):
        layers, base = np.arange(allocation.mean_XL.shape[1]), 0.0
        for kind, values_L in zip(KINDS, allocation.mean_XL):
            top.bar(layers, values_L, bottom=base, width=0.9, color=COLOURS[kind], label=KEYS[kind])
            base = base + values_L
        top.set_title(f"{task}: {query} looks at", fontsize=10)
        below.plot(layers, np.exp(allocation.mean_XL[4]), "o-", color="black", markersize=3, label="all tokens (exp of entropy)")
        below.plot(layers, allocation.mean_XL[5], "o-", color=COLOURS["image"], markersize=3, label="image tokens")
        below.set_xlabel("layer")
        for axis in (top, below):
            _layer_ticks(axis.xaxis, len(layers), most=8)
            axis.set_xlim(-0.6, len(layers) - 0.4)
    axes[0, 0].set_ylabel("share of attention")
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylabel("spread over … tokens")
    axes[1, 0].set_yscale("log", base=2)
    axes[1, 0].set_ylim(bottom=1)
    axes[1, 0].yaxis.set_major_formatter("{x:.0f}")
    for row, title in enumerate(("attention on", "effective number of")):
        axes[row, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, title=title)
    figure.suptitle("Where the attention of each task's text and image tokens goes, mean over heads", fontsize=11)
    return save_figure(figure, path)


def head_maps(shares: dict[tuple[str, str], Allocation], path: Path) -> Path:
    """Share of attention on image tokens by layer and key/value head, a map per task and kind of query that sees images."""
    shares = {key: allocation for key, allocation in shares.items() if np.isfinite(allocation.mean_XL[-1]).any()} or shares
    num_layers, num_groups = next(iter(shares.values())).groups_XLG.shape[1:]
    size = (max(2.4, 0.5 * num_groups + 1.2) * len(shares) + 1, max(2.6, 0.32 * num_layers + 1.4))
    figure, axes = pyplot.subplots(1, len(shares), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis, ((task, query), allocation) in zip(axes[0], shares.items()):
        image = _heat_map(axis, allocation.groups_XLG[KINDS.index("image")], 0, 1, colours="magma", with_numbers=num_groups <= 16)
        axis.set_title(f"{task}:\n{query} looks at images", fontsize=9)
        axis.set_xlabel("key/value head")
        _layer_ticks(axis.xaxis, num_groups)
        _layer_ticks(axis.yaxis, num_layers)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label="share of attention on image tokens")
    return save_figure(figure, path)


def drop_curves(candidates: Sequence[Candidate], dense_flops: float, num_layers: int, path: Path, *, chosen: Any = None) -> Path:
    """The rise of each task's loss when its images leave at a layer; and every candidate's rise against what it saves."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for t, (task, kind, words) in enumerate(
        (("understanding", LateDrop, "read, leave for good"), ("generation", Away, "drawn, away until the last layer"))
    ):
        of_task = [c for c in candidates if c.task == task]
        curve = [c for c in of_task if isinstance(c.policy, kind)]
        left.plot([c.layer for c in curve], [c.rise_t[t] for c in curve], "o-", color=SIDES[task], label=f"{task}: {words}")
        for marker, some in (("o", curve), (".", [c for c in of_task if c not in curve])):
            right.plot([c.saved_flops / dense_flops for c in some], [c.weighted_rise for c in some], marker, color=SIDES[task])
    left.set_title("what it costs when all tokens of the images leave", fontsize=10)
    left.set_xlabel("layers that see the images before they leave")
    left.set_ylabel("rise of the task's loss (nats per token)")
    left.xaxis.set_ticks(range(1, num_layers, -(-num_layers // MOST_TICKS)))
    left.set_xlim(0.5, num_layers - 0.5)
    left.legend(fontsize=8)
    right.set_xlabel("saved share of all forward FLOPs")
    right.set_ylabel("rise of the training's loss (weighted)")
    title = "circles: as on the left; dots: bypasses"
    if chosen is not None:
        right.plot(1 - chosen.flops_share, chosen.weighted_rise, "*", color="black", markersize=14)
        title += "; star: suggested"
    right.set_title(f"what is paid for what is saved\n{title}", fontsize=10)
    for axis in (left, right):
        axis.axhline(0, color="grey", linewidth=0.8)
    return save_figure(figure, path)


def gradient_maps(entries: Sequence[dict[str, Any]], pair: str, path: Path) -> Path:
    """Two tasks: cosines and ratios of norms by layer and part at the newest checkpoint; cosines and interference over training."""
    blocks, tasks = entries[-1]["gradients"][pair], pair.split("_")
    num_layers = 1 + max(int(name[6:8]) for name in blocks if name.startswith("layer_"))
    heights = [max(3.4, 0.28 * num_layers + 1.2), 3.4]
    figure, ((cosine, ratio), (cosines, interference)) = pyplot.subplots(
        2, 2, figsize=(12, sum(heights)), height_ratios=heights, layout="constrained"
    )

    def table(of) -> np.ndarray:
        return np.array([[of(blocks[f"layer_{layer:02d}/{part}"]) for part in PARTS] for layer in range(num_layers)])

    ratios = table(lambda b: np.log2(max(b["norms"][1], 1e-30) / max(b["norms"][0], 1e-30)))
    for axis, values, limit, colours, title in (
        (cosine, table(lambda b: b["cosine"]), 1, "RdBu", "cosine of the tasks' gradients (blue: same way)"),
        (ratio, ratios, max(1.0, np.abs(ratios).max()), "PuOr_r", f"log2 of the gradients' norms, {tasks[1]} / {tasks[0]}"),
    ):
        image = _heat_map(axis, values, -limit, limit, colours=colours, with_numbers=True)
        axis.set_xticks(range(len(PARTS)), PARTS)
        _layer_ticks(axis.yaxis, num_layers)
        axis.set_ylabel("layer")
        axis.set_title(f"{title}, step {entries[-1]['step']}", fontsize=10)
        figure.colorbar(image, ax=axis)
    steps, colours = [entry["step"] for entry in entries], iter(CYCLE)
    for name in [*PARTS, *(name for name in blocks if not name.startswith("layer_"))]:
        members = [f"layer_{layer:02d}/{name}" for layer in range(num_layers)] if name in PARTS else [name]
        style = {
            "marker": "o",
            "markersize": 3,
            "label": "whole model" if name == "all" else name.replace("_", " "),
            "linestyle": "-" if name in PARTS else "--",
        }
        style |= {"color": "black", "linewidth": 2.5, "linestyle": "-"} if name == "all" else {"color": next(colours)}
        here = [[entry["gradients"][pair][member] for member in members] for entry in entries]
        cosines.plot(steps, [np.mean([b["cosine"] for b in some if np.isfinite(b["cosine"])] or [np.nan]) for some in here], **style)
        undone = np.array([np.linalg.norm([b["interference"] for b in some]) for some in here])
        interference.plot(steps, undone / [max(min(e["gradients"][pair]["all"]["norms"]), 1e-30) for e in entries], **style)
    cosines.axhline(0, color="grey", linewidth=0.8)
    cosines.set_title("cosine over training (mean over layers)", fontsize=10)
    interference.set_title("what the tasks undo of each other, share of the smaller gradient", fontsize=10)
    for axis in (cosines, interference):
        axis.set_xlabel("step")
        if len(steps) <= 8:
            axis.set_xticks(steps)
    figure.legend(*cosines.get_legend_handles_labels(), loc="outside right lower", fontsize=8, title="part")
    return save_figure(figure, path)


def similarity_map(entries: Sequence[dict[str, Any]], path: Path) -> Path:
    """CKA of read and drawn images by layer, over training."""
    values = np.array([entry["cka"] for entry in entries]).T
    num_states = len(values)
    figure, axis = pyplot.subplots(figsize=(max(3.6, 0.6 * len(entries) + 2), max(2.8, 0.32 * num_states + 1.2)), layout="constrained")
    image = _heat_map(axis, values, 0, 1, colours="viridis", with_numbers=len(entries) <= MOST_TICKS)
    axis.set_xticks(range(len(entries)), [entry["step"] for entry in entries], rotation=45 if len(entries) > 6 else 0)
    axis.set_yticks(range(num_states), ["embedding" if s == 0 else f"layer {s - 1}" for s in range(num_states)])
    axis.set_xlabel("step")
    axis.set_title("states of an image,\nread and drawn", fontsize=10)
    figure.colorbar(image, ax=axis, label="linear CKA: 1 alike, 0 unrelated")
    return save_figure(figure, path)


def _heat_map(axis, values: np.ndarray, low: float, high: float, *, colours: str, with_numbers: bool):
    """Cells with their values written in; what is NaN stays grey."""
    axis.set_facecolor("#DDDDDD")
    image = axis.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
    if with_numbers:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                axis.text(column, row, f"{value:.2f}".replace("0.", ".", 1), ha="center", va="center", fontsize=7, color=ink)
    return image


def _layer_ticks(axis, num: int, most: int = MOST_TICKS) -> None:
    axis.set_ticks(range(0, num, -(-num // most)))
