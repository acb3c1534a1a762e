"""Models made directly on the device, and packs for them. Tested by `tests/tools/test_gpu_check.py`.

Letters: G sums that the backbone gives.
"""

import numpy as np
import torch

from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample, Span
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.data.read.sample import Coordinates
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.routing import policies as p
from megavlm.routing.phases import Phases
from megavlm.routing.tasks import Task

DENSE = p.Dense()
EVERY_POLICY: dict[str, tuple[p.Policy, p.Policy]] = {
    "dense": (DENSE, DENSE),
    "late_drop": (p.LateDrop(after_layer=2), DENSE),
    "late_entry": (p.LateEntry(at_layer=1), p.LateEntry(at_layer=2)),
    "random_ltd": (p.RandomLTD(keep_ratio=0.4), p.RandomLTD(keep_ratio=0.6)),
    "random_ltd, key_norm": (p.RandomLTD(keep_ratio=0.5, selector="key_norm"), p.Tread(keep_ratio=0.3, first_layer=1, end_layer=3)),
    "pyramid": (p.Pyramid(), DENSE),
    "pyramid, question_attention": (
        p.Pyramid(selector="question_attention"),
        p.RandomLTD(keep_ratio=0.5, selector="stride"),
    ),
    "pyramid, redundancy": (p.Pyramid(selector="redundancy", num_parts=3), DENSE),
    "tread": (p.Tread(first_layer=1, end_layer=-1), p.Tread(first_layer=0, end_layer=3)),
    "shared_bypass": (p.SharedBypass(keep_ratio=0.25), p.SharedBypass(keep_ratio=0.5)),
    "mixture_of_depths": (p.MixtureOfDepths(), p.MixtureOfDepths(keep_ratio=0.3)),
    "kv_injection": (p.KVInjection(), p.KVInjection()),
    "merge": (p.Merge(at_layer=1), DENSE),
    "merge, kv_injection": (p.Merge(at_layer=2, keep_ratio=0.7), p.KVInjection()),
    "visible_bypass": (p.VisibleBypass(keep_ratio=0.25), p.VisibleBypass(selector="random")),
    "sparse_mlp": (p.SparseMLP(keep_ratio=0.3), p.SparseMLP(first_layer=0, end_layer=4)),
    "patches": (p.Patches(), p.Patches()),
    "late_drop, mixture_of_depths": (p.LateDrop(after_layer=2), p.MixtureOfDepths()),
}
"""Understanding's and generation's policy: every policy and every selector that megavlm has, for four layers."""
ROUTES: dict[str, tuple[p.Policy, p.Policy]] = {
    "dense": (DENSE, DENSE),
    "shared_bypass": (p.SharedBypass(keep_ratio=0.25), p.SharedBypass(keep_ratio=0.5)),
    "random_ltd": (p.RandomLTD(keep_ratio=0.5), p.RandomLTD(keep_ratio=0.5)),
}
"""What is timed; none has modules of its own, so that one model serves all."""


def phases_of(policies: tuple[p.Policy, p.Policy], num_layers: int) -> Phases:
    """The policies in full from the first step on."""
    return Phases.always(*policies, num_layers)


def make_backbone(architecture: dict, vocabulary: int, phases: Phases, device: torch.device, **options) -> Backbone:
    """A backbone with random float32 weights that were never anywhere else than on the device."""
    torch.manual_seed(0)
    with device:
        return Backbone(make_causal_lm(architecture, vocabulary), phases, num_sources=1, **options)


def make_samples(lengths: list[int], image_side: int, vocabulary: int) -> list[EncodedSample]:
    """Samples of these lengths with an image each, read and drawn in turn, and text around it."""
    rng, image, samples = np.random.default_rng(0), image_side**2, []
    for index, length in enumerate(lengths):
        reads, has_loss = index % 2 == 0, np.zeros(length, bool)
        span = Span(2, image_side, image_side, False) if reads else Span(length - image - 2, image_side, image_side, True)
        if reads:
            has_loss[-8:] = True
        else:
            has_loss[span.start - 1 :] = True
        task = Task.UNDERSTANDING if reads else Task.GENERATION
        tokens = rng.integers(vocabulary, size=length)
        samples.append(EncodedSample(str(index), Coordinates(0, 0, 0, index), tokens, has_loss, np.full(length, task), (span,), int(task)))
    return samples


def make_pack(samples: list[EncodedSample], phases: Phases, backbone: Backbone) -> Pack:
    """A pack of these samples, on the host."""
    costing = Costing(phases, ModelShape.of(backbone.causal_lm.config))
    return build_pack(samples, costing, num_sources=1, lane=0, step=0, seed=0)


def uniform_lengths(pack_tokens: int, image_side: int) -> list[int]:
    """Lengths of an even number of samples that fill a pack, an image and at least 64 tokens of text each."""
    num = max(2, 2 * round(pack_tokens / (image_side**2 + 64) / 2))
    return [pack_tokens // num] * num


def loss_of(sums_G: torch.Tensor, pack: Pack) -> torch.Tensor:
    """One number of a pack's sums: the mean over labelled rows, and a little of the gates' loss."""
    return sums_G[:-1].sum() / len(pack.rows_M) + 1e-4 * sums_G[-1]
