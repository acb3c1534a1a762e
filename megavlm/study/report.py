"""The report of a study: `report.md`, `report.png` and `report.json` in the study's folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.study.hparams import write_hparams
from megavlm.study.results import Results
from megavlm.study.spec import DENSE, JOINT, Metric
from megavlm.study.statistics import ENOUGH_SEEDS, Interval, bootstrap, chance_of_agreement, gain, retained
from megavlm.system.files import write_atomically

TIME = "cpu_seconds"
"""CPU time, because on a shared machine the clock also counts what else runs. On GPUs use `seconds`."""


def write_report(results: Results, command: str) -> Path:
    """Write the report of the seeds that are complete.

    Returns:
        The Markdown file.
    """
    study, folder = results.study, Path(results.study.study_dir)
    summary = summarize(results) | {"command": command, "seeds": results.seeds}
    write_atomically(folder / "report.json", json.dumps(summary, indent=1, default=vars))
    _plot(summary, folder / "report.png")
    text = "\n\n".join([
        f"# {folder.name}",
        f"`{command}`",
        f"Arms: {', '.join(study.tasks)} alone and both together, under {', '.join(study.policies)};"
        f" seeds {', '.join(map(str, results.seeds))};"
        " equal tokens per task and step in every arm, and equal steps unless a policy sets its own."
        f" {_about_intervals(summary['num_seeds'])}",
        "## What it says",
        "\n".join(f"- {line}" for line in statements(summary)),
        "![quality against FLOPs and time; synergy](report.png)",
        "## Quality, joint training",
        _table(["policy", *_metric_names(summary), "FLOPs", "time"], [_joint_row(summary, policy) for policy in summary["policies"]]),
        "FLOPs and CPU time of training relative to dense joint training.",
        "## Synergy: joint minus alone",
        _table(
            ["policy", "task", "metric", "alone", "joint", "synergy", "retained of dense"],
            [row for policy in summary["policies"] for row in _synergy_rows(summary, policy)],
        ),
        "Synergy is signed so that positive is a gain. Alone is under the same policy. *Retained* is a share of the dense synergy. It is"
        " left out where the seeds do not agree that dense training has any.",
        "## Every run",
        _table(["run", *_metric_names(summary), "labelled tokens", "PFLOPs", "CPU min"], _run_rows(results)),
    ])  # fmt: skip
    write_hparams(results, folder / "tensorboard")
    path = folder / "report.md"
    write_atomically(path, text + "\n")
    return path


def _about_intervals(num_seeds: int) -> str:
    if num_seeds >= ENOUGH_SEEDS:
        return "Intervals are 95% percentiles of the bootstrap over seeds."
    return (
        f"Intervals are the whole range of the bootstrap over {num_seeds} seeds, which are too few for its percentiles. A difference is"
        f" claimed where all seeds agree on its sign. By chance alone they agree in {chance_of_agreement(num_seeds):.0%} of cases, so a"
        " single claim is weak."
    )


def summarize(results: Results) -> dict[str, Any]:
    """Every number of the report."""
    study = results.study
    dense_flops, dense_time = (results.total(DENSE, JOINT, name) for name in ("executed_flops", TIME))
    policies = {}
    for policy in study.policies:
        share = lambda a, b: a.mean() / b.mean()  # noqa: E731
        tasks = {}
        for task, settings in study.tasks.items():
            tasks[task] = {}
            for metric in settings.metrics:
                joint, alone = results.metric(policy, JOINT, metric), results.metric(policy, task, metric)
                dense = results.metric(DENSE, JOINT, metric), results.metric(DENSE, task, metric)
                dense_gain = gain(*dense)
                tasks[task][metric.name] = {
                    "alone": bootstrap(np.mean, alone), "joint": bootstrap(np.mean, joint), "synergy": gain(joint, alone),
                    "joint_minus_dense_joint": gain(joint, dense[0]),
                    "retained": retained(joint, alone, *dense) if dense_gain.low > 0 else None,
                    "better": metric.better,
                }  # fmt: skip
        policies[policy] = {
            "flops_share": bootstrap(share, results.total(policy, JOINT, "executed_flops"), dense_flops),
            "time_share": bootstrap(share, results.total(policy, JOINT, TIME), dense_time),
            "tasks": tasks,
        }
    return {"policies": policies, "num_seeds": len(results.seeds)}


def statements(summary: dict[str, Any]) -> list[str]:
    """Claims, only as far as the intervals allow them."""
    if summary["num_seeds"] < 3:
        return [f"With {summary['num_seeds']} complete seeds nothing is claimed; three are the least."]
    lines = []
    for task, metrics in summary["policies"][DENSE]["tasks"].items():
        name, first = next(iter(metrics.items()))
        dense = first["synergy"]
        if dense.low > 0:
            lines.append(f"**Dense joint training helps {task}** ({name}): {dense:+.3g}. Its loss can be asked for.")
        elif dense.high < 0:
            lines.append(f"**Dense joint training hurts {task}** ({name}): {dense:+.3g}. There is no synergy to keep here.")
        else:
            lines.append(
                f"Whether dense joint training helps {task} ({name}) is open: {dense:+.3g}. Nothing follows about what policies keep of it."
            )
        for policy, entry in summary["policies"].items():
            if policy != DENSE:
                lines.append(_statement(policy, entry, task, name))
    return lines


def _statement(policy: str, entry: dict, task: str, name: str) -> str:
    found = entry["tasks"][task][name]
    gap, kept = found["joint_minus_dense_joint"], found["retained"]
    quality = "is below" if gap.high < 0 else "is above" if gap.low > 0 else "cannot be told from"
    share = entry["flops_share"].value
    text = f"{policy}, {task}: at {share:.0%} of dense FLOPs its joint quality {quality} dense joint training's ({gap:+.3g})"
    if kept is None:
        return text + "."
    if kept.low >= 0.95:
        verdict = "it keeps at least 95% of the synergy"
    elif kept.high < 0.95:
        verdict = "it keeps less than 95% of the synergy"
    else:
        verdict = "whether it keeps 95% of the synergy is open"
    return f"{text}; {verdict} ({kept:.0%})."


def _signed_back(interval: Interval, better: str) -> Interval:
    return interval if better == "high" else Interval(-interval.value, -interval.high, -interval.low)


def _metric_names(summary: dict) -> list[str]:
    return [f"{task}: {name}" for task, metrics in summary["policies"][DENSE]["tasks"].items() for name in metrics]


def _joint_row(summary: dict, policy: str) -> list[str]:
    entry = summary["policies"][policy]
    cells = [f"{_signed_back(m['joint'], m['better']):.3f}" for metrics in entry["tasks"].values() for m in metrics.values()]
    return [policy, *cells, f"{entry['flops_share'].value:.1%}", f"{entry['time_share'].value:.1%}"]


def _synergy_rows(summary: dict, policy: str) -> list[list[str]]:
    rows = []
    for task, metrics in summary["policies"][policy]["tasks"].items():
        for name, m in metrics.items():
            alone, joint = (f"{_signed_back(m[key], m['better']).value:.3f}" for key in ("alone", "joint"))
            kept = "" if m["retained"] is None else f"{m['retained']:.0%}"
            rows.append([policy, task, name, alone, joint, f"{m['synergy']:+.3f}", kept])
    return rows


def _run_rows(results: Results) -> list[list[str]]:
    rows, seen = [], set()
    for (_, data, _), run in results.runs.items():
        if run["folder"] in seen:
            continue
        seen.add(run["folder"])
        cells = []
        for task, settings in results.study.tasks.items():
            cells += [_cell(run, metric) if data in (JOINT, task) else "" for metric in settings.metrics]
        totals = run["totals"]
        labels = " + ".join(f"{totals[f'labels_of_{task}']:,.0f}" for task in results.study.tasks if totals[f"labels_of_{task}"])
        rows.append([run["folder"], *cells, labels, f"{totals['executed_flops'] / 1e15:.2f}", f"{totals[TIME] / 60:.1f}"])
    return rows


def _cell(run: dict, metric: Metric) -> str:
    value = run["evaluation"]
    for name in metric.path.split("."):
        value = value[name]
    return f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plot(summary: dict, path: Path) -> None:
    from megavlm.system.pictures import plain, pyplot, save_figure

    policies = summary["policies"]
    tasks = {task: next(iter(metrics)) for task, metrics in policies[DENSE]["tasks"].items()}
    colors = dict(zip(policies, [f"C{i}" for i in range(10)]))
    figure, axes = pyplot.subplots(len(tasks), 3, figsize=(13, 3.6 * len(tasks)), layout="constrained", squeeze=False)
    for row, (task, name) in zip(axes, tasks.items()):
        better = policies[DENSE]["tasks"][task][name]["better"]
        for axis, key, label in zip(
            row, ("flops_share", "time_share"), ("training FLOPs, share of dense", "training time, share of dense")
        ):
            for policy, entry in policies.items():
                quality, share = _signed_back(entry["tasks"][task][name]["joint"], better), entry[key]
                axis.errorbar(
                    share.value,
                    quality.value,
                    xerr=[[share.value - share.low], [share.high - share.value]],
                    yerr=[[quality.value - quality.low], [quality.high - quality.value]],
                    fmt="o",
                    color=colors[policy],
                    label=plain(policy),
                    capsize=3,
                )
            axis.set(xlabel=label, ylabel=f"{task}: {name}, joint")
            if better == "low":
                axis.invert_yaxis()
            axis.grid(alpha=0.3)
        axis = row[2]
        for place, (policy, entry) in enumerate(policies.items()):
            synergy = entry["tasks"][task][name]["synergy"]
            error = [[synergy.value - synergy.low], [synergy.high - synergy.value]]
            axis.bar(place, synergy.value, yerr=error, color=colors[policy], capsize=4, width=0.7)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(policies)), map(plain, policies), rotation=25, ha="right")
        axis.set(ylabel="joint minus alone (up is good)", title=f"synergy of {task}")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"quality and synergy, {summary['num_seeds']} seeds, intervals over seeds")
    save_figure(figure, path, dpi=130)
