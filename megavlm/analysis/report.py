"""The results of `megavlm analyze`: RUN/analysis/*.json and *.png, images in TensorBoard, and a short summary.

Letters: L layers, G key/value heads, X statistics.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from megavlm.analysis import figures
from megavlm.analysis.attention import STATISTICS, Allocation, AttentionWatch
from megavlm.analysis.geometry import geometry_of_run
from megavlm.analysis.probe import Away, Candidate, Probe
from megavlm.analysis.subject import Subject
from megavlm.analysis.suggest import Suggestion, suggest
from megavlm.routing.policies import LateDrop
from megavlm.routing.tasks import TASKS
from megavlm.runs.manifest import step_of
from megavlm.system.files import write_atomically
from megavlm.system.progress import progress


@torch.no_grad()
def analyze_attention(subject: Subject, num_rows: int) -> tuple[Table, list[Path]]:
    """Watch the attention in the subject's packs. Returns a summary, and the files written."""
    watch = AttentionWatch(
        subject.model.costing.shape, subject.model.encoder.vocabulary, subject.config.seed, num_rows, num_sequences=10**6
    )
    for pack in progress(subject.packs(), "watch attention"):
        with watch.on(subject.model.backbone, pack):
            subject.model.backbone(pack.to(subject.model.device))
    shares = watch.shares()
    document = _head(subject) | {
        "attention": {
            f"{task}/{query}": {"rows": allocation.queries}
            | {s: {"mean": allocation.mean_XL[i], "heads": allocation.groups_XLG[i]} for i, s in enumerate(STATISTICS)}
            for (task, query), allocation in shares.items()
        }
    }
    folder = _folder(subject)
    written = [
        write_json(folder / "attention.json", document),
        figures.attention_shares(shares, folder / "attention.png"),
        figures.head_maps(shares, folder / "attention_heads.png"),
    ]
    _to_tensorboard(subject, written[1:])
    return _attention_table(shares), written


def analyze_drops(
    subject: Subject, keep_ratios: Iterable[float], flops_share: float | None, shared: bool
) -> tuple[Table, Suggestion | None, list[Path]]:
    """Probe the subject. Returns a summary, a route where a share was asked for, and the files written."""
    config = subject.config
    model = subject.model
    probe = Probe(
        model.backbone,
        model.costing.shape,
        subject.groups,
        len(config.data.sources),
        task_weights=config.loss.task_weights,
        device=model.device,
    )
    candidates = probe.curves(_progress("images leave"))
    if flops_share is not None:
        candidates += probe.bypasses(tuple(keep_ratios), _progress("images pass by"))
    document = _head(subject) | {
        "dense_loss": dict(zip(TASKS, probe.dense.losses_t)),
        "dense_forward_flops": probe.dense.dense_flops,
        "task_weights": dict(zip(TASKS, probe.weights_t)),
        "candidates": [_describe(candidate, probe.dense.dense_flops) for candidate in candidates],
    }
    folder = _folder(subject)
    written = [write_json(folder / "drops.json", document)]  # there even where the target is out of reach
    chosen = None if flops_share is None else suggest(probe, candidates, flops_share, shared)
    written.append(figures.drop_curves(candidates, probe.dense.dense_flops, probe.shape.num_layers, folder / "drops.png", chosen=chosen))
    _to_tensorboard(subject, written[1:])
    if chosen is not None:
        written.append(folder / "route.yaml")
        write_atomically(written[-1], _remark(subject, chosen) + chosen.recipe())
    return _drop_table(candidates, probe), chosen, written


def analyze_geometry(subject: Subject, num_images: int) -> tuple[Table, list[Path]]:
    """Compare the tasks at every checkpoint. Returns a summary, and the files written."""
    entries, folder = geometry_of_run(subject, num_images), _folder(subject)
    written = [write_json(folder / "geometry.json", _head(subject) | {"checkpoints": entries})]
    for pair in entries[-1]["gradients"]:
        written.append(figures.gradient_maps(entries, pair, folder / f"gradients_{pair}.png"))
    if entries[-1]["cka"]:
        written.append(figures.similarity_map(entries, folder / "similarity.png"))
    _to_tensorboard(subject, written[1:])
    table = Table(
        "step", *(f"cosine, {pair.replace('_', ' and ')}" for pair in entries[-1]["gradients"]), "CKA after the last layer", box=box.SIMPLE
    )
    for entry in entries:
        cosines = [f"{blocks['all']['cosine']:+.3f}" for blocks in entry["gradients"].values()]
        table.add_row(str(entry["step"]), *cosines, f"{entry['cka'][-1]:.3f}" if entry["cka"] else "")
    return table, written


def write_json(path: Path, document: Any) -> Path:
    """Write a document as JSON: arrays become lists, and numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(_plain(document), indent=1, allow_nan=False))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _head(subject: Subject) -> dict[str, Any]:
    return {
        "checkpoint": subject.model.checkpoint.name,
        "samples_from": subject.origin,
        "samples": sum(map(len, subject.groups)),
        "route": subject.config.evaluation.route,
    }


def _folder(subject: Subject) -> Path:
    return subject.model.folder.path / "analysis"


def _to_tensorboard(subject: Subject, pictures: Iterable[Path]) -> None:
    with SummaryWriter(str(subject.model.folder.tensorboard / "analysis")) as writer:
        for path in pictures:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            writer.add_image(f"analysis/{path.stem}", pixels, step_of(subject.model.checkpoint), dataformats="HWC")


def _progress(words: str) -> Callable:
    return lambda work: progress(work, words)


def _attention_table(shares: dict[tuple[str, str], Allocation]) -> Table:
    """The share on image tokens in thirds of the depth."""
    title = "share of attention on image tokens, by thirds of the depth; effective image tokens in the last"
    table = Table("queries", "rows", "first", "middle", "last", "effective", title=title, title_justify="left", box=box.SIMPLE)
    for (task, query), allocation in shares.items():
        thirds = np.array_split(allocation.mean_XL[STATISTICS.index("image")], 3)
        last = np.array_split(allocation.mean_XL[-1], 3)[-1]
        numbers = [f"{x:.1%}" if math.isfinite(x) else "-" for x in map(_mean, thirds)]
        table.add_row(f"{task}: {query}", str(allocation.queries), *numbers, f"{x:.1f}" if math.isfinite(x := _mean(last)) else "-")
    return table


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _drop_table(candidates: list[Candidate], probe: Probe) -> Table:
    table = Table("images leave after", *(f"{t}: loss {probe.dense.losses_t[i]:.3f}" for i, t in enumerate(TASKS[:2])), box=box.SIMPLE)
    curve = {(c.task, c.layer): c for c in candidates if isinstance(c.policy, (LateDrop, Away))}
    for layer in range(1, probe.shape.num_layers):
        cells = []
        for t, task in enumerate(TASKS[:2]):
            c = curve.get((task, layer))
            cells.append(f"{c.rise_t[t]:+.4f}, saves {c.saved_flops / probe.dense.dense_flops:.1%}" if c else "")
        table.add_row(f"{layer} layers", *cells)
    return table


def _describe(candidate: Candidate, dense_flops: float) -> dict[str, Any]:
    return {
        "images": "read" if candidate.task == "understanding" else "drawn",
        "policy": candidate.policy.model_dump(mode="json"),
        "first_layer_without": candidate.layer,
        "rise_of_loss": dict(zip(TASKS, candidate.rise_t)),
        "weighted_rise": candidate.weighted_rise,
        "saved_flops_share": candidate.saved_flops / dense_flops,
        "weighted_rise_per_saved_exaflop": candidate.rise_per_saved_exaflop,
    }


def _remark(subject: Subject, chosen: Suggestion) -> str:
    return (
        f"# suggested by `megavlm analyze drops` from {subject.model.checkpoint.name}: leaves {chosen.flops_share:.1%} of forward FLOPs\n"
        f"# of the probe's packs; the training's loss rose by {chosen.weighted_rise:.4f} without any training on the route\n"
    )
