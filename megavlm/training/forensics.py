"""Skipped steps leave their packs' names behind, and those packs can be run again.

``RUN/forensics/step-00000012.json`` holds why the step was skipped, and for each of its packs the samples and the
lane's state before it, from which the same lane makes the same pack again.

Letters: G sums that the backbone gives, t tasks. Tested by `tests/distributed/test_faults.py`.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from megavlm.engine.guard import BadStep
from megavlm.engine.weights import load_weights
from megavlm.errors import MegavlmError
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_run_config
from megavlm.randomness import Purpose, integer_seed
from megavlm.routing.tasks import TASKS
from megavlm.runs.checkpoints import run_of
from megavlm.runs.manifest import complete_checkpoints, is_checkpoint_name, step_of
from megavlm.system.files import DamagedFile, read_json, write_atomically

log = logging.getLogger(__name__)


def describe_packs(packs: list, states_before: dict[int, Any]) -> list[dict]:
    """What is needed to make packs again; kept by the guard until a step's verdict is known."""
    return [
        {
            "lane": pack.lane,
            "samples": [[*map(int, place), key] for place, key in zip(pack.coordinates, pack.keys)],
            "state_before": states_before.get(pack.lane),
        }
        for pack in packs
    ]


def chain(digest: str, pack) -> str:
    """The digest of all samples that a lane has trained on so far, from that before this pack.

    Two runs with equal digests have seen the same data in the same order, whatever interrupted them.
    """
    places = json.dumps([list(map(int, place)) for place in pack.coordinates])
    return hashlib.sha256((digest + places).encode()).hexdigest()


def report_path(folder: Path, step: int) -> Path:
    """The file of a skipped step, counted from 0."""
    return folder / f"step-{step + 1:08d}.json"


def write_report(path: Path, bad: BadStep, packs: list[dict], learning_rate: float) -> None:
    """Write one skipped step's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "step": bad.step + 1,
        "reason": bad.reason,
        "loss": str(bad.loss),
        "gradient_norm": str(bad.gradient_norm),
        "learning_rate": learning_rate,
        "packs": sorted(packs, key=lambda pack: pack["lane"]),
    }
    write_atomically(path, json.dumps(report))


def replay(run: str | Path, step: int | None = None) -> dict[str, Any]:
    """Run the packs of a skipped step again, in this one process, and say what each of them does.

    The weights are those of the newest intact checkpoint from before the step, the precision is float32: what is
    still not finite then is the data or the weights, not the hardware or the number format.

    Args:
        run: The run folder; or one checkpoint in it, if the weights are to be its.
        step: As in the name of the file in ``forensics/``; the last one by default.

    Returns:
        Per pack its mean loss per task, gradient norm, samples, and the first modules whose output is not finite.
    """
    folder, named = run_of(run)
    report = _read_report(folder.forensics, step)
    parts = Parts(load_run_config(folder))
    config = parts.config
    before = [path for path in complete_checkpoints(folder.checkpoints) if step_of(path) < report["step"]]
    checkpoint = named or (before[-1] if before else None)
    torch.manual_seed(config.seed)
    backbone = parts.make_backbone()
    if checkpoint:
        load_weights(checkpoint, backbone)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    names = list(config.data.sources)
    results = []
    for entry in report["packs"]:
        pack, _ = next(parts.make_lane(entry["lane"], entry["state_before"]))
        samples = [[*map(int, place), key] for place, key in zip(pack.coordinates, pack.keys)]
        if samples != entry["samples"]:
            raise MegavlmError(
                f"lane {entry['lane']} gives other samples than in step {report['step']}: the sources have changed\n"
                "  do:    bring back the shards that the run was trained on"
            )
        seed = integer_seed(config.seed, Purpose.MODULES, pack.step, pack.lane)
        result = _run_pack(backbone, pack, seed)
        result["samples"] = [f"{names[source]} shard {shard} sample {index}: {key}" for source, _, shard, index, *_, key in samples]
        results.append({"lane": pack.lane} | result)
    weights = checkpoint.name if checkpoint else "initial weights"
    return {"step": report["step"], "reason": report["reason"], "weights": weights, "packs": results}


def _run_pack(backbone, pack, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    culprits: list[str] = []

    def look(name):
        def hook(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            # detached, so that the hook leaves no trace in the graph, which is compared when parts of it are run again
            if isinstance(first, torch.Tensor) and not torch.isfinite(first.detach()).all():
                culprits.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in backbone.named_modules() if name]
    device = next(backbone.parameters()).device
    loss_sums_G = backbone(pack.to(device))[: backbone.num_groups]
    for hook in hooks:
        hook.remove()
    backbone.zero_grad()
    (loss_sums_G.sum() / max(1, int(pack.labels.sum()))).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    bad_gradients = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    losses_t = loss_sums_G.detach().view(-1, len(TASKS)).sum(0).tolist()
    labels = pack.task_labels
    return {
        "loss": {task: losses_t[t] / int(labels[t]) for t, task in enumerate(TASKS) if labels[t]},
        "gradient_norm": float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))),
        "modules_not_finite": culprits[:5],
        "gradients_not_finite": bad_gradients[:5],
    }


def _read_report(folder: Path, step: int | None) -> dict[str, Any]:
    reports = sorted(path for path in folder.glob("step-*.json") if is_checkpoint_name(path.stem))
    wanted = [path for path in reports if step is None or path.stem == f"step-{step:08d}"]
    if not wanted:
        known = ", ".join(str(int(path.stem.removeprefix("step-"))) for path in reports) or "none"
        raise MegavlmError(f"{folder} has no report of step {step or ''}\n  do:    name a step that was skipped: {known}")
    report = read_json(wanted[-1])
    if not {"step", "reason", "packs"} <= set(report):
        raise DamagedFile(f"{wanted[-1]} is damaged: it is no report")
    return report
