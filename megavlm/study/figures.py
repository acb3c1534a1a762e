"""The figure of a study: quality against cost with the curve of dense training, synergy, and how much of it is kept.

Tested by `tests/study/test_report.py`.
"""

from pathlib import Path
from typing import Any

from megavlm.study.spec import DENSE
from megavlm.study.statistics import Interval
from megavlm.system.pictures import plain, pyplot, save_figure

COSTS = (("flops_share", "training FLOPs, share of dense"), ("time_share", "training time, share of dense"))


def plot(summary: dict[str, Any], path: Path) -> None:
    """Write the figure: a row for the first metric of each task.

    Args:
        summary: As `megavlm.study.report.summarize` gives it.
        path: A PNG.
    """
    policies = summary["policies"]
    tasks = {task: next(iter(metrics)) for task, metrics in policies[DENSE]["tasks"].items()}
    colors = {policy: f"C{number % 10}" for number, policy in enumerate(policies)}
    figure, axes = pyplot.subplots(len(tasks), 4, figsize=(17, 3.6 * len(tasks)), layout="constrained", squeeze=False)
    for row, (task, name) in zip(axes, tasks.items()):
        found = {policy: entry["tasks"][task][name] for policy, entry in policies.items()}
        for axis, (cost, label) in zip(row, COSTS):
            if lengths := summary["lengths"].values():
                better = found[DENSE]["better"]
                _curve(axis, [(entry[cost].value, signed_back(entry["tasks"][task][name]["joint"], better)) for entry in lengths])
            for policy, entry in policies.items():
                quality = signed_back(found[policy]["joint"], found[policy]["better"])
                _point(axis, entry[cost], quality, color=colors[policy], label=plain(policy))
            axis.set(xlabel=label, ylabel=f"{task}: {name}, joint")
            if found[DENSE]["better"] == "low":
                axis.invert_yaxis()
            axis.grid(alpha=0.3)
        synergies = {policy: entry["synergy"] for policy, entry in found.items()}
        _bars(row[2], synergies, colors, ylabel="joint minus alone (up is good)", title=f"synergy of {task}")
        kept = {policy: entry["retained"] for policy, entry in found.items() if entry["retained"] is not None and policy != DENSE}
        _bars(row[3], kept, colors, ylabel="share of the dense synergy", title=f"retained synergy of {task}")
        row[3].axhline(1, color="black", linewidth=0.8, linestyle="dotted")
        if not kept:
            row[3].set_title(f"dense training has no sure synergy of {task}")
    axes[0, 0].legend(fontsize=8)
    counts = sorted({entry["num_seeds"] for entry in policies.values()})
    figure.suptitle(f"quality and synergy, {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds, intervals over seeds")
    save_figure(figure, path, dpi=130)


def signed_back(interval: Interval, better: str) -> Interval:
    """As the metric is written, where what is low is good."""
    return interval if better == "high" else Interval(-interval.value, -interval.high, -interval.low)


def _curve(axis, points: list[tuple[float, Interval]]) -> None:
    """Dense training of every length, joined: (share of the cost, quality) of each."""
    shares = [share for share, _ in points]
    axis.plot(shares, [quality.value for _, quality in points], "-o", color="black", markersize=3, linewidth=1, label="dense, by length")
    axis.fill_between(shares, [quality.low for _, quality in points], [quality.high for _, quality in points], color="black", alpha=0.1)


def _point(axis, share: Interval, quality: Interval, **style) -> None:
    errors = [[[one.value - one.low], [one.high - one.value]] for one in (share, quality)]
    axis.errorbar(share.value, quality.value, xerr=errors[0], yerr=errors[1], fmt="o", capsize=3, **style)


def _bars(axis, intervals: dict[str, Interval], colors: dict[str, str], **words) -> None:
    for place, (policy, one) in enumerate(intervals.items()):
        axis.bar(place, one.value, yerr=[[one.value - one.low], [one.high - one.value]], color=colors[policy], capsize=4, width=0.7)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(intervals)), map(plain, intervals), rotation=25, ha="right")
    axis.set(**words)
