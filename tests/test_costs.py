import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.costs import BACKWARD_FACTOR
from megavlm.data.pack.pack import Costing
from megavlm.routing.route import BIAS_WIDTH
from tests.model.test_backbone import MIXED, make_backbone
from tests.routing.layouts import POLICIES, SHAPE, make_pack, make_samples, phases


@pytest.mark.parametrize("policy", POLICIES)
def test_formula_agrees_with_torchs_counter(policy):
    """The counter sees the math kernel, which computes the whole square of scores; we count the causal half."""
    backbone, pack = copy.deepcopy(make_backbone(policy)).float(), make_pack(MIXED * 4, policy)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        hidden, _ = backbone.hidden_states(pack)
    expected = pack.flops[:-1].sum()
    for stage in pack.route.stages:
        attended = stage.injections[0].sequences if stage.injections else stage.sequences
        merged = attended if any(choice.plan.how == "merge" for choice in stage.choices) else None
        if stage.split is not None:
            merged = stage.split.merged
        squares = sum(length**2 for length in attended.lengths)
        if merged is not None:
            squares += sum(length**2 for length in merged.lengths) * BIAS_WIDTH / SHAPE.head_width
        num_layers = stage.end_layer - stage.first_layer
        expected += num_layers * SHAPE.layer_flops_per_square * squares
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        hidden.sum().backward()
    # the first layer's input, the embedding, takes a gradient too
    assert backward.get_total_flops() == pytest.approx(BACKWARD_FACTOR * expected, rel=0.01)


def test_head():
    backbone, pack = copy.deepcopy(make_backbone(chunk_rows=200)).float(), make_pack(MIXED, "dense")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.causal_lm.lm_head(torch.zeros(len(pack.rows_M), SHAPE.width))
    assert counter.get_total_flops() == pack.flops[-1]


def test_sliding_windows_save_the_pairs_that_they_do_not_see():
    shape = replace(SHAPE, windows=(100, None, 100, 40))
    lengths, bounds = np.array([1000, 90]), [(0, 1), (1, 4)]
    seen = [[sum(min(place + 0.5, window or length) for place in range(length)) for window in shape.windows] for length in lengths]
    pairs = [sum(seen[0][:1]), sum(seen[1][1:])]
    full = np.array([end - first for first, end in bounds]) * shape.layer_flops_per_square * lengths**2
    ours = full - shape.unseen_flops(lengths, bounds)
    np.testing.assert_allclose(ours, 2 * shape.layer_flops_per_square * np.array(pairs), rtol=1e-2)
    sample = make_samples([[("TEXT", 120, 1)]])[0]
    dense, windowed = (Costing(phases("dense"), s).flops(sample.layout, 0) for s in (SHAPE, shape))
    assert windowed[:-1].sum() < dense[:-1].sum() and windowed[-1] == dense[-1]
    of_pack = Costing(phases("dense"), shape).dense_flops(sample.layout)
    np.testing.assert_allclose(of_pack, windowed.sum())
