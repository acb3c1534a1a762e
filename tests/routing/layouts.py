"""Random packs for property tests: adversarial layouts of samples with image spans, and routes of every policy over them."""

import numpy as np
from hypothesis import strategies as st

from megavlm.costs import ModelShape
from megavlm.data.encode import GENERATION, TEXT, UNDERSTANDING, EncodedSample, Span
from megavlm.data.pack import Costing, build_pack
from megavlm.data.sample import Coordinates
from megavlm.routing.policies import Dense, LateDrop, RandomLTD
from megavlm.routing.route import RoutingPlan, Schedule

NUM_LAYERS, VOCABULARY = 4, 50
SHAPE = ModelShape(32, NUM_LAYERS, 4, 2, 8, 64, VOCABULARY)

POLICIES = {
    "dense": (Dense(), Dense()),
    "late_drop": (LateDrop(policy="late_drop", after_layer=2), Dense()),
    "late_drop_early": (LateDrop(policy="late_drop", after_layer=1, selector="stride"), Dense()),
    "random_ltd": (RandomLTD(policy="random_ltd", keep_ratio=0.4), RandomLTD(policy="random_ltd", keep_ratio=0.6)),
    "one_kept": (RandomLTD(policy="random_ltd", keep_ratio=0.001), RandomLTD(policy="random_ltd", keep_ratio=0.001)),
    "per_task": (
        LateDrop(policy="late_drop", after_layer=2),
        RandomLTD(policy="random_ltd", keep_ratio=0.5, selector="stride"),
    ),
}


def costing(policy: str, strength: float = 1.0) -> Costing:
    """A policy in full, or with a warm-up that has got to ``strength`` at step 0 (only 0 and 1 are used)."""
    schedule = Schedule(10, 0.0, 0.0) if strength else Schedule(10, 0.0, 1.0)
    return Costing(RoutingPlan(*POLICIES[policy], NUM_LAYERS, schedule), SHAPE)


def make_sample(rng: np.random.Generator, parts: list[tuple[str, int, int]], index: int) -> EncodedSample:
    """``parts`` are ("text" | "image", height, width) with an upper-case kind for a loss; text has height tokens."""
    tokens, has_loss, tasks, spans = [int(rng.integers(VOCABULARY))], [False], [TEXT], []
    for kind, height, width in parts:
        loss = kind.isupper()
        if kind.lower() == "image":
            spans.append(Span(len(tokens) + 1, height, width, loss))
            size, task = height * width + 2, GENERATION if loss else UNDERSTANDING
        else:
            size, task = height, UNDERSTANDING
        tokens += rng.integers(VOCABULARY, size=size).tolist()
        has_loss += [loss] * size
        tasks += [task] * size
    return EncodedSample(
        f"s{index}", Coordinates(0, 0, 0, index), np.array(tokens), np.array(has_loss), np.array(tasks), tuple(spans)
    )


PARTS = st.lists(
    st.tuples(st.sampled_from(["text", "TEXT", "image", "IMAGE"]), st.integers(1, 4), st.integers(1, 4)), max_size=4
)
LAYOUTS = st.lists(PARTS, min_size=1, max_size=5)
"""Samples of a pack: without images, without a loss, of a single token, with several images of one code or more."""


def make_samples(layout: list, seed: int = 0) -> list[EncodedSample]:
    rng = np.random.default_rng(seed)
    return [make_sample(rng, parts, i) for i, parts in enumerate(layout)]


def make_pack(layout: list, policy: str, seed: int = 0):
    return build_pack(make_samples(layout, seed), costing(policy), num_sources=1, lane=0, step=0, seed=seed)
