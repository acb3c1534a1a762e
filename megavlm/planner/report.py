"""A plan in words, tables and a figure. Tested by `tests/planner/test_plan.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavlm.planner.plan import Outlook, Planner
from megavlm.system.files import write_atomically


def report(planner: Planner, world_size: int, out: Path) -> str:
    """The plan as text in Markdown; its figure goes to ``out`` (PNG), its numbers beside it (JSON)."""
    here, dense, table = planner.outlook(world_size), planner.outlook(world_size, dense=True), planner.table()
    checkpointing = planner.checkpointing(world_size)
    remedies = [] if here.fits else list(planner.remedies(world_size))
    document: dict[str, Any] = {
        "rates": planner.rates.origin,
        "is_measured": planner.rates.is_measured,
        "here": here.as_document(),
        "dense": dense.as_document(),
        "activation_checkpointing": {str(choice).lower(): outlook.as_document() for choice, outlook in checkpointing},
        "table": [outlook.as_document() for outlook in table],
        "remedies": remedies,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(document, indent=1))
    _draw(planner, table, out, here=here, dense=dense)
    return "\n".join(_lines(planner, here, dense, table, checkpointing=checkpointing, remedies=remedies))


def _lines(planner: Planner, here: Outlook, dense: Outlook, table: list[Outlook], *, checkpointing, remedies: list[str]) -> Iterator[str]:
    rates = planner.rates
    model = planner.model(planner.config, planner.situation)
    active = f", {_active(model) / 1e9:.2f}B of them per token" if model.shape.num_experts else ""
    yield f"{model.num_parameters / 1e9:.2f}B parameters{active} on {here.world_size} x {rates.name}; rates: {rates.origin}"
    if planner.sequence_parallel > 1:
        yield f"{planner.sequence_parallel} processes share a pack: extrapolated, training does not do it (docs/long-sequences.md)"
    yield ""
    verdict = "fits" if here.fits else "does not fit"
    yield f"Memory of a process, {here.memory.total / 1e9:.2f} of {rates.memory_bytes / 1e9:.0f} GB: {verdict}"
    yield from _table(["part", "GB"], [[name, f"{value / 1e9:.2f}"] for name, value in vars(here.memory).items()])
    for remedy in remedies:
        yield f"  do:    {remedy}"
    yield ""
    yield "Activation checkpointing"
    rows = [[str(c).lower(), f"{o.memory.total / 1e9:.2f}", "yes" if o.fits else "no", f"{o.time.total:.3f}"] for c, o in checkpointing]
    yield from _table(["every n-th layer", "GB", "fits", "step s"], rows)
    yield ""
    yield f"A step takes {here.time.total:.3f} s, {here.packs_per_step} packs, {here.tokens_per_s:,.0f} tokens/s{_mfu(here)}"
    parts = [[name, f"{value:.4f}", f"{value / here.time.total:.0%}"] for name, value in vars(here.time).items()]
    yield from _table(["part", "s", "share"], parts)
    yield f"Packs: the dearest of a step cost {here.imbalance:.3f} times the mean one (stages summed)"
    yield ""
    same = here.tokens_per_s / dense.tokens_per_s
    yield (
        f"The run: {planner.config.optimizer.num_steps:,} steps, {here.gpu_hours:,.0f} GPU-hours. The route takes {1 / same:.0%} of the"
        f" time without it for the same tokens: {here.gpu_hours * (same - 1):,.0f} GPU-hours saved"
    )
    yield ""
    rows = [
        [
            str(o.world_size),
            str(o.packs_per_step),
            f"{o.memory.total / 1e9:.1f}",
            "yes" if o.fits else "no",
            f"{o.time.total:.3f}",
            f"{o.tokens_per_s:,.0f}",
            "-" if o.executed_mfu is None else f"{o.executed_mfu:.0%}",
            "-" if o.dense_equivalent_mfu is None else f"{o.dense_equivalent_mfu:.0%}",
            f"{o.gpu_hours:,.0f}",
        ]
        for o in table
    ]
    yield from _table(["GPUs", "packs", "GB", "fits", "step s", "tokens/s", "MFU executed", "dense-equivalent", "GPU-hours"], rows)


def _active(model) -> float:
    """Parameters that a token passes."""
    shape = model.shape
    idle = (shape.num_experts - shape.active_experts) * shape.mlp_matrices * shape.mlp_width * shape.width
    return model.num_parameters - shape.num_layers * idle


def _mfu(outlook: Outlook) -> str:
    if outlook.executed_mfu is None:
        return ""
    return f", MFU {outlook.executed_mfu:.1%} executed, {outlook.dense_equivalent_mfu:.1%} dense-equivalent"


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _draw(planner: Planner, table: list[Outlook], out: Path, *, here: Outlook, dense: Outlook) -> None:
    from megavlm.system.pictures import plain, pyplot, save_figure

    figure, (memory, step, scale) = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _stacked(memory, [(str(o.world_size), vars(o.memory)) for o in table], 1e9)
    memory.axhline(planner.rates.memory_bytes / 1e9, color="black", linewidth=1, linestyle="--")
    memory.set(xlabel="GPUs", ylabel="GB of a process", title="memory; dashed: the device's")
    _stacked(step, [(f"route,\n{here.world_size} GPUs", vars(here.time)), (f"dense,\n{dense.world_size} GPUs", vars(dense.time))], 1)
    step.set(ylabel="s", title="a step")
    worlds = [o.world_size for o in table]
    scale.plot(worlds, [o.tokens_per_s for o in table], marker="o", label="with the route")
    scale.plot(worlds, [table[0].tokens_per_s * world / worlds[0] for world in worlds], linestyle="--", label="in proportion")
    scale.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s", title="throughput")
    scale.set_xticks(worlds, [str(world) for world in worlds])
    scale.minorticks_off()
    scale.legend()
    kind = "measured rates" if planner.rates.is_measured else "extrapolated from the data sheet"
    figure.suptitle(plain(f"{planner.config.run_dir} on {planner.rates.name}, {kind}", width=120))
    save_figure(figure, out)


def _stacked(axis, bars: list[tuple[str, dict[str, float]]], unit: float) -> None:
    bottoms = [0.0] * len(bars)
    for number, name in enumerate(bars[0][1]):
        heights = [values[name] / unit for _, values in bars]
        axis.bar([label for label, _ in bars], heights, bottom=bottoms, label=name, color=f"C{number}")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    axis.legend(fontsize=8)
