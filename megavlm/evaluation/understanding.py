"""Understanding: does the model give the right answer about an image?

A sample can be judged if its ``meta`` has the right ``answer``. Scoring also needs the ``choices``.

Tested by `tests/evaluation/test_sampling.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.data.read.sample import Sample
from megavlm.evaluation.batches import BATCH_TOKENS, batches
from megavlm.evaluation.sampling import answer
from megavlm.model.backbone import Backbone
from megavlm.model.ends import final_norm, logits_of
from megavlm.routing.tasks import TASKS
from megavlm.system.progress import progress

BATCH_SAMPLES = 128
CHUNK_ROWS = 8192
"""Labelled rows that go through the output head at a time."""


@torch.no_grad()
def sample_losses(
    backbone: Backbone, samples: Sequence[EncodedSample], costing: Costing, *, device, batch_tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """The summed cross-entropy of each sample's labelled tokens ``[len(samples)]``, which is minus its log-likelihood."""
    losses = []
    lengths = [sample.num_tokens for sample in samples]
    for rows in progress([*batches(lengths, batch_tokens, BATCH_SAMPLES)], "score samples"):
        batch = list(samples[rows])
        pack = build_pack(batch, costing, num_sources=1, lane=0, step=0, seed=0).to(device)
        h_TD, _ = backbone.hidden_states(pack)
        h_MD = final_norm(backbone.causal_lm, h_TD[pack.rows_M])
        loss_M = torch.cat(
            [
                functional.cross_entropy(logits_of(backbone.causal_lm, h).float(), targets, reduction="none")
                for h, targets in zip(h_MD.split(CHUNK_ROWS), pack.targets_M.split(CHUNK_ROWS))
            ]
        )
        owner_M = np.repeat(np.arange(len(batch)), [sample.has_loss.sum() for sample in batch])
        losses.append(np.bincount(owner_M, loss_M.double().cpu().numpy(), minlength=len(batch)))
    return np.concatenate(losses)


def task_losses(
    backbone: Backbone, samples: Sequence[Sample], encoder: Encoder, costing: Costing, *, device, batch_tokens: int = BATCH_TOKENS
) -> dict[str, float]:
    """Task → mean cross-entropy per labelled token of its samples, in nats: the training's objective, on held-out samples."""
    encoded = [encoder(sample) for sample in samples]
    losses = sample_losses(backbone, encoded, costing, device=device, batch_tokens=batch_tokens)
    labels, tasks = np.array([sample.has_loss.sum() for sample in encoded]), np.array([sample.task for sample in encoded])
    return {TASKS[task]: float(losses[tasks == task].sum() / labels[tasks == task].sum()) for task in np.unique(tasks)}


def scored_right(
    backbone: Backbone, samples: Sequence[Sample], encoder: Encoder, costing: Costing, *, device, batch_tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """Whether the right answer of each sample is the most likely of its choices: bool ``[len(samples)]``."""
    variants = [encoder(_with_answer(sample, choice)) for sample in samples for choice in sample.meta["choices"]]
    losses, right, begin = sample_losses(backbone, variants, costing, device=device, batch_tokens=batch_tokens), [], 0
    for sample in samples:
        choices = sample.meta["choices"]
        best = losses[begin : begin + len(choices)].argmin()
        right.append(choices[best] == sample.meta["answer"])
        begin += len(choices)
    return np.array(right, bool)


def written_right(
    backbone: Backbone, samples: Sequence[Sample], encoder: Encoder, costing: Costing, *, device, batch_tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """Whether the model answers each sample right when it writes freely, greedily and until ``<eos>``: bool ``[len(samples)]``."""
    right = []
    for begin in progress(range(0, len(samples), BATCH_SAMPLES), "answer questions"):
        batch = samples[begin : begin + BATCH_SAMPLES]
        prompts = [encoder(sample).prompt() for sample in batch]
        answers = answer(backbone, encoder, prompts, costing, device=device, batch_tokens=batch_tokens)
        right += [given.strip() == sample.meta["answer"] for given, sample in zip(answers, batch)]
    return np.array(right, bool)


def _with_answer(sample: Sample, text: str) -> Sample:
    segments = tuple(s.model_copy(update={"text": text}) if s.loss else s for s in sample.segments)
    return replace(sample, segments=segments)
