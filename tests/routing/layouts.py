"""Random packs for property tests: adversarial layouts of samples with image spans, and routes of every policy over them."""

import numpy as np
from hypothesis import strategies as st

from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample, Span
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.data.read.sample import Coordinates
from megavlm.routing.phases import Phases
from megavlm.routing.policies import (
    Dense,
    KVInjection,
    LateDrop,
    LateEntry,
    Merge,
    MixtureOfDepths,
    Patches,
    Pyramid,
    RandomLTD,
    SharedBypass,
    SparseMLP,
    Tread,
    VisibleBypass,
)
from megavlm.routing.tasks import Task

NUM_LAYERS, VOCABULARY = 4, 150
SHAPE = ModelShape(32, NUM_LAYERS, 4, 2, 8, 64, VOCABULARY)

DENSE = Dense()
POLICIES = {
    "dense": (DENSE, DENSE),
    "late_drop": (LateDrop(after_layer=2), DENSE),
    "late_entry": (LateEntry(at_layer=1), LateEntry(at_layer=2)),
    "random_ltd": (RandomLTD(keep_ratio=0.4), RandomLTD(keep_ratio=0.6)),
    "one_kept": (RandomLTD(keep_ratio=0.001), RandomLTD(keep_ratio=0.001)),
    "pyramid": (Pyramid(), DENSE),
    "pyramid_question": (Pyramid(selector="question_attention"), RandomLTD(keep_ratio=0.5, selector="stride")),
    "pyramid_redundancy": (Pyramid(selector="redundancy", num_parts=3), DENSE),
    "ltd_key_norm": (RandomLTD(keep_ratio=0.5, selector="key_norm"), Tread(keep_ratio=0.3, first_layer=1, end_layer=3)),
    "tread": (Tread(first_layer=1, end_layer=-1), Tread(first_layer=0, end_layer=3)),
    "shared_bypass": (SharedBypass(keep_ratio=0.25), SharedBypass(keep_ratio=0.5)),
    "shared_bypass_stride": (SharedBypass(keep_ratio=0.25, selector="stride"), SharedBypass(selector="stride")),
    "mixture_of_depths": (MixtureOfDepths(), MixtureOfDepths(keep_ratio=0.3)),
    "kv_injection_understanding": (KVInjection(), DENSE),
    "kv_injection_generation": (DENSE, KVInjection()),
    "kv_injection_both": (KVInjection(), KVInjection()),
    "merge": (Merge(at_layer=1), DENSE),
    "merge_and_injection": (Merge(at_layer=2, keep_ratio=0.7), KVInjection()),
    "late_drop_and_gates": (LateDrop(after_layer=2), MixtureOfDepths()),
    "sparse_mlp": (SparseMLP(keep_ratio=0.3), SparseMLP(first_layer=0, end_layer=4)),
    "sparse_mlp_and_injection": (SparseMLP(keep_ratio=0.3, selector="redundancy"), KVInjection()),
    "visible_bypass": (VisibleBypass(keep_ratio=0.25), VisibleBypass(selector="random")),
    "visible_bypass_question": (VisibleBypass(keep_ratio=0.4, selector="question_attention"), RandomLTD(keep_ratio=0.6)),
}
PATCHES = {"patches": (Patches(), Patches()), "patches_drawn": (DENSE, Patches(size=2))}
"""They have other rows than their samples have tokens."""
EVEN = [
    [("image", 4, 4), ("text", 3, 1), ("TEXT", 2, 1)],
    [("text", 4, 1), ("IMAGE", 4, 6)],
    [("TEXT", 5, 1)],
    [],
    [("image", 2, 2), ("IMAGE", 2, 4), ("TEXT", 1, 1), ("image", 2, 6), ("TEXT", 2, 1)],
]
"""A layout that blocks of 2 x 2 can fill."""


def phases(policy: str, strength: float = 1.0) -> Phases:
    """A policy in full, or in part, in every step."""
    return Phases.always(*(POLICIES | PATCHES)[policy], NUM_LAYERS, strength)


def costing(policy: str, strength: float = 1.0) -> Costing:
    return Costing(phases(policy, strength), SHAPE)


def make_sample(rng: np.random.Generator, parts: list[tuple[str, int, int]], index: int) -> EncodedSample:
    """``parts`` are ("text" | "image", height, width) with an upper-case kind for a loss; text has height tokens."""
    # no token twice: equal tokens tie in every selector
    fresh = rng.permutation(VOCABULARY).tolist()
    tokens, has_loss, tasks, spans = [fresh.pop()], [False], [Task.TEXT], []
    for kind, height, width in parts:
        loss = kind.isupper()
        if kind.lower() == "image":
            spans.append(Span(len(tokens) + 1, height, width, loss))
            size, task = height * width + 2, Task.GENERATION if loss else Task.UNDERSTANDING
        else:
            size, task = height, Task.UNDERSTANDING
        tokens += [fresh.pop() for _ in range(size)]
        has_loss += [loss] * size
        tasks += [task] * size
    task = Task.TEXT if not spans else Task.GENERATION if any(span.has_loss for span in spans) else Task.UNDERSTANDING
    return EncodedSample(
        f"s{index}", Coordinates(0, 0, 0, index), np.array(tokens), np.array(has_loss), np.array(tasks), tuple(spans), task
    )


PARTS = st.lists(st.tuples(st.sampled_from(["text", "TEXT", "image", "IMAGE"]), st.integers(1, 4), st.integers(1, 4)), max_size=4)
LAYOUTS = st.lists(PARTS, min_size=1, max_size=5)
"""Samples of a pack: without images, without a loss, of a single token, with several images of one code or more."""


def make_samples(layout: list, seed: int = 0) -> list[EncodedSample]:
    rng = np.random.default_rng(seed)
    return [make_sample(rng, parts, i) for i, parts in enumerate(layout)]


def make_pack(layout: list, policy: str, seed: int = 0, strength: float = 1.0):
    return build_pack(make_samples(layout, seed), costing(policy, strength), num_sources=1, lane=0, step=0, seed=seed)
