"""The report of a study: `report.md`, `report.png` and `report.json` in the study's folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.errors import MegavlmError
from megavlm.study.figures import plot, signed_back
from megavlm.study.hparams import write_hparams
from megavlm.study.results import Results
from megavlm.study.spec import DENSE, JOINT, Metric
from megavlm.study.statistics import ENOUGH_SEEDS, bootstrap, chance_of_agreement, gain, retained
from megavlm.study.worth import Worth, worth
from megavlm.system.files import write_atomically

FLOPS, TIME = "executed_flops", "cpu_seconds"
"""CPU time, because on a shared machine the clock also counts what else runs. On GPUs use `seconds`."""

ENOUGH_TO_CLAIM = 3
"""Seeds."""


def write_report(results: Results, command: str) -> Path:
    """Write the report of the seeds that are complete.

    Returns:
        The Markdown file.

    Raises:
        MegavlmError: If dense training is complete for no seed.
    """
    study, folder = results.study, Path(results.study.study_dir)
    seeds = {policy: own for policy in study.policies if (own := results.seeds(policy))}
    if DENSE not in seeds:
        raise MegavlmError(
            f"{folder}: dense training is complete for no seed, so there is nothing to compare\n  do:    let the study go on"
        )
    summary: dict[str, Any] = summarize(results) | {"command": command}
    write_atomically(folder / "report.json", json.dumps(summary, indent=1, default=vars))
    plot(summary, folder / "report.png")
    lengths = [f"{share:.0%}" for share in study.lengths.values()]
    text = "\n\n".join([
        f"# {folder.name}",
        f"`{command}`",
        f"Arms: {', '.join(study.tasks)} alone and both together, under {', '.join(seeds)};"
        + (f" dense joint training also at {', '.join(lengths)} of the steps;" if lengths else "")
        + f" seeds {'; '.join(_about_seeds(seeds))};"
        " equal tokens per task and step in every arm, and equal steps unless a policy sets its own."
        f" {_about_intervals({len(own) for own in seeds.values()})}",
        "## What it says",
        "\n".join(f"- {line}" for line in statements(summary)),
        "![quality against FLOPs and time; synergy](report.png)",
        "## Quality, joint training",
        _table(
            ["policy", *_metric_names(summary), "FLOPs", "time", "seeds"],
            [_row_of(policy, entry) for policy, entry in summary["policies"].items()],
        ),
        "FLOPs and CPU time of training relative to dense joint training.",
        *_worth_section(summary),
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


def _about_seeds(seeds: dict[str, list[int]]) -> list[str]:
    """Which seeds are complete, for policies that have the same ones together."""
    sets = dict.fromkeys(tuple(own) for own in seeds.values())
    if len(sets) == 1:
        return [", ".join(map(str, own)) for own in sets]
    return [f"{', '.join(map(str, own))} of {', '.join(p for p in seeds if tuple(seeds[p]) == own)}" for own in sets]


def _about_intervals(counts: set[int]) -> str:
    few = sorted(count for count in counts if count < ENOUGH_SEEDS)
    enough = "Intervals are 95% percentiles of the bootstrap over seeds."
    if not few:
        return enough
    numbers, chances = " or ".join(map(str, few)), ", ".join(f"{chance_of_agreement(count):.0%}" for count in few)
    return (
        f"{enough + ' Those' if len(few) < len(counts) else 'Intervals'} over {numbers} seeds, which are too few for percentiles, are the"
        " bootstrap's whole range. A difference is claimed where all seeds agree on its sign. By chance alone they agree in"
        f" {chances} of cases, so a single claim is weak."
    )


def summarize(results: Results) -> dict[str, Any]:
    """Every number of the report."""
    study = results.study
    return {
        "policies": {policy: _summary_of_policy(results, policy) for policy in study.policies if results.seeds(policy)},
        "lengths": {name: _summary_of_length(results, name) for name in [*study.lengths, DENSE] if results.seeds_of_curve(DENSE)},
    }


def _summary_of_policy(results: Results, policy: str) -> dict[str, Any]:
    seeds, tasks = results.seeds(policy), {}
    for task, settings in results.study.tasks.items():
        tasks[task] = {}
        for metric in settings.metrics:
            joint, alone = results.metric(policy, JOINT, metric, seeds), results.metric(policy, task, metric, seeds)
            dense = results.metric(DENSE, JOINT, metric, seeds), results.metric(DENSE, task, metric, seeds)
            dense_gain = gain(*dense)
            tasks[task][metric.name] = {
                "alone": bootstrap(np.mean, alone), "joint": bootstrap(np.mean, joint), "synergy": gain(joint, alone),
                "joint_minus_dense_joint": gain(joint, dense[0]),
                "retained": retained(joint, alone, *dense) if dense_gain.low > 0 else None,
                "better": metric.better,
            } | (_worths(results, policy, metric) if policy != DENSE else {})  # fmt: skip
    return _costs(results, policy, seeds) | {"tasks": tasks, "num_seeds": len(seeds)}


def _summary_of_length(results: Results, name: str) -> dict[str, Any]:
    seeds = results.seeds_of_curve(DENSE)
    tasks = {
        task: {
            metric.name: {"joint": bootstrap(np.mean, results.metric(name, JOINT, metric, seeds)), "better": metric.better}
            for metric in settings.metrics
        }
        for task, settings in results.study.tasks.items()
    }
    return _costs(results, name, seeds) | {"tasks": tasks, "num_seeds": len(seeds)}


def _costs(results: Results, name: str, seeds: list[int]) -> dict[str, Any]:
    """FLOPs and time of joint training as shares of dense joint training's."""

    def share(total: str):
        own, dense = (results.total(one, JOINT, total, seeds) for one in (name, DENSE))
        return bootstrap(lambda a, b: a.mean() / b.mean(), own, dense)

    return {"flops_share": share(FLOPS), "time_share": share(TIME)}


def _worths(results: Results, policy: str, metric: Metric) -> dict[str, Worth]:
    """What dense training of the same quality costs, in shares of the whole dense run and as a multiple of the policy's cost."""
    seeds = results.seeds_of_curve(policy)
    if not seeds:
        return {}
    curve = [*results.study.lengths, DENSE]
    qualities_LS = np.stack([results.metric(name, JOINT, metric, seeds) for name in curve])
    found = {}
    for total, kind in ((FLOPS, "flops"), (TIME, "time")):
        costs_LS = np.stack([results.total(name, JOINT, total, seeds) for name in curve])
        quality_S, cost_S = results.metric(policy, JOINT, metric, seeds), results.total(policy, JOINT, total, seeds)
        found[f"dense_{kind}_of_equal_quality"] = worth(quality_S, costs_LS[-1], costs_LS, qualities_LS)
        found[f"worth_in_{kind}"] = worth(quality_S, cost_S, costs_LS, qualities_LS)
    return found


def statements(summary: dict[str, Any]) -> list[str]:
    """Claims, only as far as the intervals allow them."""
    if (num_seeds := summary["policies"][DENSE]["num_seeds"]) < ENOUGH_TO_CLAIM:
        return [f"With {num_seeds} complete seeds nothing is claimed; three are the least."]
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
            if policy != DENSE and entry["num_seeds"] >= ENOUGH_TO_CLAIM:
                lines.append(_statement(policy, entry, task, name))
    return lines


def _statement(policy: str, entry: dict, task: str, name: str) -> str:
    found = entry["tasks"][task][name]
    gap, kept = found["joint_minus_dense_joint"], found["retained"]
    quality = "is below" if gap.high < 0 else "is above" if gap.low > 0 else "cannot be told from"
    share = entry["flops_share"].value
    text = f"{policy}, {task}: at {share:.0%} of dense FLOPs its joint quality {quality} dense joint training's ({gap:+.3g})"
    if (multiple := found.get("worth_in_flops")) is not None:
        text += f"; it is worth {multiple:.2f} times its FLOPs, {_verdict(multiple)}"
    if kept is None:
        return text + "."
    if kept.low >= 0.95:
        verdict = "it keeps at least 95% of the synergy"
    elif kept.high < 0.95:
        verdict = "it keeps less than 95% of the synergy"
    else:
        verdict = "whether it keeps 95% of the synergy is open"
    return f"{text}; {verdict} ({kept:.0%})."


def _verdict(multiple: Worth) -> str:
    if multiple.low > 1:
        return "more than dense training that costs as much"
    return (
        "less than dense training that costs as much"
        if multiple.high < 1
        else "which cannot be told from dense training that costs as much"
    )


def _worth_section(summary: dict) -> list[str]:
    if not summary["lengths"]:
        return []
    rows = [
        [policy, task, name, f"{entry['flops_share'].value:.1%}", f"{m['dense_flops_of_equal_quality']:.0%}"]
        + [f"{m[f'worth_in_{kind}']:.2f}" for kind in ("flops", "time")]
        for policy, entry in summary["policies"].items()
        for task, metrics in entry["tasks"].items()
        for name, m in metrics.items()
        if "worth_in_flops" in m
    ]
    return [
        "## Cost to equal quality, joint training",
        _table(["policy", "task", "metric", "FLOPs", "dense FLOPs of equal quality", "worth, in FLOPs", "worth, in time"], rows),
        "Dense training was repeated at several lengths, its schedule fitted to each. The curve through them, never worse than what a"
        " shorter run reached, says how much of the whole dense run reaches a policy's quality. Divided by the policy's own FLOPs (or CPU"
        " time) that is what it is worth: above 1 it beats dense training that costs as much. < and > mean that the curve ends there.",
        _table(
            ["dense, by length", *_metric_names(summary), "FLOPs", "time", "seeds"],
            [_row_of(name, entry) for name, entry in summary["lengths"].items()],
        ),
    ]


def _metric_names(summary: dict) -> list[str]:
    return [f"{task}: {name}" for task, metrics in summary["policies"][DENSE]["tasks"].items() for name in metrics]


def _row_of(policy: str, entry: dict) -> list[str]:
    cells = [f"{signed_back(m['joint'], m['better']):.3f}" for metrics in entry["tasks"].values() for m in metrics.values()]
    return [policy, *cells, f"{entry['flops_share'].value:.1%}", f"{entry['time_share'].value:.1%}", str(entry["num_seeds"])]


def _synergy_rows(summary: dict, policy: str) -> list[list[str]]:
    rows = []
    for task, metrics in summary["policies"][policy]["tasks"].items():
        for name, m in metrics.items():
            alone, joint = (f"{signed_back(m[key], m['better']).value:.3f}" for key in ("alone", "joint"))
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
        rows.append([run["folder"], *cells, labels, f"{totals['executed_flops'] / 1e15:.3g}", f"{totals[TIME] / 60:.1f}"])
    return rows


def _cell(run: dict, metric: Metric) -> str:
    value = run["evaluation"]
    for name in metric.path.split("."):
        value = value[name]
    return f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
