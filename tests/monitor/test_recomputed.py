"""FLOPs of what is computed again are counted apart from those of the model."""

import pytest
import torch

from megavlm.monitor.metrics import Meters
from megavlm.system.world import World
from tests.routing.layouts import make_pack, phases

PACK = make_pack([[("image", 3, 4), ("TEXT", 2, 1)], [("text", 4, 1), ("IMAGE", 4, 4)]], "random_ltd")


def meters(recomputed: float) -> Meters:
    bounds = phases("random_ltd").bounds
    return Meters(World(0, 1, 0, torch.device("cpu")), ["only"], bounds, [recomputed] * len(bounds) + [0.0])


def test_what_is_computed_again_is_counted_apart():
    found = meters(0.5)
    found.add_pack(PACK, torch.zeros(3))
    assert found.flops.sum() == pytest.approx(PACK.flops.sum())
    assert found.again_flops == pytest.approx(PACK.flops[:-1].sum() / 2)
    again = meters(0.5)
    again.load_state([found.state()], {})
    assert again.again_flops == found.again_flops and again.tokens == found.tokens == PACK.num_tokens


def test_sums_from_before_it_was_counted_are_taken_over():
    found = meters(1.0)
    found.add_pack(PACK, torch.zeros(3))
    state = found.state()
    again = meters(1.0)
    again.load_state([state | {"sums": state["sums"][:-1]}], {})
    assert (again.tokens, again.again_flops) == (PACK.num_tokens, 0.0)
