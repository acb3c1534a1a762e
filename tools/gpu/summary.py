"""The JSON of a check as a page to read. Tested by `tests/tools/test_gpu_check.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavlm.system.files import write_atomically
from tools.gpu.record import Record

Items = dict[str, dict[str, Any]]


def write_summary(path: Path) -> None:
    """Write ``summary.md`` beside the JSON."""
    record = Record(path)
    sections, sessions = record.tree["sections"], record.tree["sessions"]
    parts = [f"# GPU check\n\n{_machine(record)}\n", "## Sections\n", _overview(sections)]
    for name, show in DETAILS.items():
        measured = {item: entry["result"] for item, entry in sections.get(name, {"items": {}})["items"].items() if entry.get("result")}
        if measured:
            parts.append(f"\n## {name}\n\n{show(measured)}")
    failed = [(name, item, entry) for name, of in sections.items() for item, entry in of["items"].items() if entry.get("failures")]
    if failed:
        parts.append(
            "\n## What failed\n\n" + "\n".join(f"- **{name}: {item}**: {'; '.join(entry['failures'])}" for name, item, entry in failed)
        )
    if len({session["source"] for session in sessions}) > 1:
        parts.append("\nThe sessions ran different versions of the code; each item names its session in the JSON.")
    write_atomically(path.parent / "summary.md", "\n".join(parts) + "\n")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in [head, ["---"] * len(head), *rows]
    )


def _machine(record: Record) -> str:
    session = record.tree["sessions"][-1]
    found = record.result("go", "machine") or {}
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    device = found.get("name", session["device"])
    return (
        f"{device}, {found.get('cores', '?')} cores; Python {session['python']}, {versions}; code {session['source']}; {session['begin']}."
    )


def _overview(sections: dict[str, Any]) -> str:
    rows = []
    for name, section in sections.items():
        statuses = [entry["status"] for entry in section["items"].values()]
        counts = [statuses.count(status) for status in ("passed", "failed", "running")]
        rows.append([name, *counts, f"{section['seconds']:.0f} s", "ran out of time" if section.get("out_of_time") else ""])
    return table(["section", "passed", "failed", "unfinished", "took", ""], rows)


def _parity(items: Items) -> str:
    rows = []
    for dtype in ("float32", "bfloat16"):
        cells = {name: result[dtype] for name, result in items.items() if dtype in result}
        for key, pick in (("choices_apart", max), ("loss_error", max), ("gradient_error", max), ("gradient_cosine", min)):
            worst = pick(cells, key=lambda name, key=key, cells=cells: cells[name][key])
            rows.append([dtype, key.replace("_", " "), f"{cells[worst][key]:.3g}", worst])
    return table(["precision", "what", "worst", "of"], rows)


def _sync(items: Items) -> str:
    rows = [[route, *(f"{result['per_step'].get(package, 0):g}" for package in PACKAGES)] for route, result in items.items()]
    stacks = [
        [route, f"{row['per_step']:g}", row["whose"], f"`{row['stack'][-1]}`"] for route, of in items.items() for row in of["stacks"][:12]
    ]
    judged = "" if all(result["is_judged"] for result in items.values()) else "On a CPU nothing is judged.\n\n"
    return judged + table(["route", *PACKAGES], rows) + "\n\nWaits per step.\n\n" + table(["route", "per step", "whose", "where"], stacks)


PACKAGES = ("megavlm", "deepspeed", "transformers", "other")


def _engine(items: Items) -> str:
    rows = []
    for name, result in items.items():
        if "resume" in result:
            resume = result["resume"]
            identical = "bit-identical" if resume["is_bit_identical"] else f"{resume['largest_difference_of_a_loss']:.2g} off in a loss"
            rows.append([name, f"{result['largest_error']:.2g}", f"from step {resume['from_step']}: {identical}"])
        else:
            rows.append([name, "", f"{result['skipped']:.0f} skipped"])
    return table(["", "largest error of a loss", "resume, or bad steps"], rows)


def _ceilings(items: Items) -> str:
    rows = []
    for name, result in items.items():
        for what, value in result.get("flops_per_s", {}).items():
            rows.append([name, what, f"{value / 1e12:.3g} TFLOP/s"])
        for length, value in result.get("by_length", {}).items():
            both = value["both_flops_per_s"] / 1e12
            rows.append([name, f"{length} tokens", f"{value['forward_flops_per_s'] / 1e12:.3g} TFLOP/s, with backward {both:.3g}"])
        for what in ("copy_bytes_per_s", "from_host_bytes_per_s"):
            if what in result:
                rows.append([name, what.removesuffix("_bytes_per_s").replace("_", " "), f"{result[what] / 1e9:.3g} GB/s"])
    return table(["", "what", "reached"], rows)


def _mfu(items: Items) -> str:
    rows = []
    for name, result in items.items():
        for route, row in result.items():
            if isinstance(row, dict) and "step_s" in row:
                shares = [None if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_of_ceiling")]
                saving = "" if row["realised_saving"] is None else f"{row['realised_saving']:.2f}"
                peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else None
                rows.append(
                    [
                        name,
                        route,
                        f"{row['tokens_per_s']:,.0f}",
                        f"{1000 * row['step_s']:.1f}",
                        f"{row['host_ms']:.1f}",
                        *shares,
                        saving,
                        peak,
                    ]
                )
    head = ["", "route", "tokens/s", "step ms", "host ms", "MFU, data sheet", "MFU, measured ceiling", "realised saving", "peak GiB"]
    return table(head, rows)


def _profile(items: Items) -> str:
    rows, kernels = [], []
    for model, result in items.items():
        for route, row in result.items():
            idle = None if row["idle_share"] is None else f"{row['idle_share']:.1%}"
            rows.append([model, route, f"{row['whole_ms']:.1f}", idle, row["launches"], row["kinds"], row["trace"]])
            kernels += [[model, route, f"`{k['name'][:90]}`", k["count"], f"{k['ms']:.2f}"] for k in row["kernels"][:8]]
    head = table(["model", "route", "ms", "idle", "launches", "kinds of kernels", "trace"], rows)
    return head + "\n\n" + table(["model", "route", "kernel", "times", "ms"], kernels)


def _study(items: Items) -> str:
    rows = []
    for name, arm in items.get("arms", {}).get("arms", {}).items():
        losses = {} if arm is None else arm["losses"]
        rows.append([name, *(f"{losses[task]:.3f}" if task in losses else None for task in ("understanding", "generation"))])
    return table(["arm", "loss of held-out answers", "loss of held-out images"], rows)


DETAILS: dict[str, Callable[[Items], str]] = {
    "parity": _parity,
    "sync": _sync,
    "engine": _engine,
    "ceilings": _ceilings,
    "mfu": _mfu,
    "profile": _profile,
    "study": _study,
}
