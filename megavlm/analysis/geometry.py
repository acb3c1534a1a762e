"""The geometry of the tasks over a run: alignment of their gradients and similarity of their states, at every checkpoint that exists.

Letters: G sums that the backbone gives. Tested by `tests/analysis/test_report.py`.
"""

import logging
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from megavlm.analysis.gradients import alone, factors_of_tasks
from megavlm.analysis.similarity import similarity_by_layer
from megavlm.analysis.subject import Subject
from megavlm.engine.weights import load_weights
from megavlm.routing.tasks import TASKS
from megavlm.runs.manifest import complete_checkpoints, step_of

log = logging.getLogger(__name__)


def geometry_of_run(subject: Subject, num_images: int) -> list[dict[str, Any]]:
    """One entry per complete checkpoint, oldest first: ``step``, ``gradients`` (pair of tasks → block → alignment) and ``cka`` per layer.

    All checkpoints see the same packs and images. Afterwards the subject's backbone has the weights of the newest checkpoint.

    Args:
        subject: The run and its samples.
        num_images: Images whose drawn and read states are compared; fewer if the samples have fewer.
    """
    packs = [pack.to(subject.model.device) for pack in subject.packs()]
    labels_t = np.sum([pack.task_labels for pack in packs], axis=0)
    factors = factors_of_tasks(_factors(subject, labels_t), labels_t)
    drawn = [s for group in subject.groups for s in group if any(span.has_loss for span in s.spans)][:num_images]
    # images that are read as features have no codes to compare with those that are drawn
    comparable = drawn and not subject.model.encoder.image_tokenizer.feature_width
    found = []
    for path in complete_checkpoints(subject.model.folder.checkpoints):
        load_weights(path, subject.model.backbone)
        pairs = alone(subject.model.backbone, packs, factors)
        cka = (
            similarity_by_layer(subject.model.backbone, subject.model.encoder, drawn, subject.model.costing, device=subject.model.device)
            if comparable
            else None
        )
        gradients = {pair: {block: asdict(a) for block, a in blocks.items()} for pair, blocks in pairs.items()}
        found.append({"step": step_of(path), "gradients": gradients, "cka": cka})
        log.info("%s: %s", path.name, _in_short(found[-1]))
    return found


def _factors(subject: Subject, labels_t: np.ndarray) -> torch.Tensor:
    """The factors of a step on these packs alone. The gates' loss is left out: it belongs to no task."""
    weights = subject.config.loss.task_weights
    factor_t = np.array([weights.get(task, 1.0) for task in TASKS]) / np.maximum(labels_t, 1)
    factor_G = np.append(np.tile(factor_t, len(subject.config.data.sources)), 0.0)
    return torch.tensor(factor_G, dtype=torch.float32, device=subject.model.device)


def _in_short(entry: dict[str, Any]) -> str:
    parts = [f"{pair} cosine {blocks['all']['cosine']:+.3f}" for pair, blocks in entry["gradients"].items()]
    return ", ".join(parts + ([f"CKA after the last layer {entry['cka'][-1]:.3f}"] if entry["cka"] else []))
