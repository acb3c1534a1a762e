import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.encode import Span
from megavlm.data.pack import Layout
from megavlm.errors import ConfigError
from megavlm.routing.policies import Dense, LateDrop, RandomLTD
from megavlm.routing.route import RoutingPlan, Schedule, num_kept
from tests.routing.layouts import LAYOUTS, NUM_LAYERS, POLICIES, SHAPE, costing, make_pack, make_samples

EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)


@EVERY_POLICY
@settings(deadline=None, max_examples=50)
@given(layout=LAYOUTS, seed=st.integers(0, 3))
def test_counts_costs_and_boundaries_follow_from_lengths_alone(policy, layout, seed):
    """P4: what a stage costs is known without looking at content or chance."""
    pack, other = make_pack(layout, policy, seed), make_pack(layout, policy, seed + 10)
    stages = pack.route.stages
    assert [s.first_layer for s in stages] == [0, *(s.end_layer for s in stages[:-1])] and stages[-1].end_layer == NUM_LAYERS
    for stage, other_stage, flops, kept in zip(stages, other.route.stages, pack.flops, pack.kept_tokens):
        lengths = stage.sequences.lengths
        assert lengths == other_stage.sequences.lengths and min(lengths) >= 1
        assert stage.sequences.cu_seqlens.tolist() == np.concatenate([[0], np.cumsum(lengths)]).tolist()
        assert flops == SHAPE.layers_flops(lengths, stage.end_layer - stage.first_layer).sum()
        if stage.active_K is None:
            assert sum(lengths) == pack.num_tokens
        else:
            active = stage.active_K.numpy()
            assert (np.diff(active) > 0).all() and len(active) == sum(lengths) < pack.num_tokens
            # whole pack minus the image tokens that are not kept
            assert pack.num_tokens - len(active) == pack.image_tokens.sum() - kept.sum()


@EVERY_POLICY
@settings(deadline=None, max_examples=50)
@given(layout=LAYOUTS)
def test_only_image_tokens_leave_and_those_with_a_loss_come_back(policy, layout):
    pack = make_pack(layout, policy)
    is_image = np.zeros(pack.num_tokens, bool)
    drawn = np.zeros(pack.num_tokens, bool)
    offset = 0
    for sample in make_samples(layout):
        for span in sample.spans:
            rows = slice(offset + span.start, offset + span.start + span.length)
            is_image[rows], drawn[rows] = True, span.has_loss
        offset += sample.num_tokens
    for stage in pack.route.stages:
        absent = np.ones(pack.num_tokens, bool)
        absent[slice(None) if stage.active_K is None else stage.active_K.numpy()] = False
        assert not (absent & ~is_image).any()
        if stage.end_layer == NUM_LAYERS:
            assert not (absent & drawn).any()


def test_schedule_warms_up_and_finishes_dense():
    schedule = Schedule(num_steps=100, warmup_fraction=0.1, dense_finish_fraction=0.2)
    assert [schedule.strength(step) for step in (0, 5, 10, 79, 80, 99)] == [0, 0.5, 1, 1, 0, 0]


def test_a_share_keeps_at_least_one_token():
    assert num_kept(np.array([1, 3, 64]), np.array([0.01, 1 / 3, 0.25])).tolist() == [1, 1, 16]


def test_random_ltd_draws_anew_in_every_middle_layer_and_late_drop_draws_nothing():
    stages = make_pack([[("image", 4, 4), ("TEXT", 1, 1)]], "random_ltd").route.stages
    assert [s.active_K is None for s in stages] == [True, False, False, True]
    assert stages[1].active_K.tolist() != stages[2].active_K.tolist()
    stages = make_pack([[("image", 4, 4), ("TEXT", 2, 1)]], "late_drop").route.stages
    assert stages[1].active_K.tolist() == [0, 1, 18, 19, 20]


def test_stride_keeps_every_second_token_of_every_second_row():
    policy = RandomLTD(policy="random_ltd", keep_ratio=0.25, selector="stride")
    plan = RoutingPlan(policy, Dense(), NUM_LAYERS, Schedule(1, 0, 0))
    route = plan.route(np.array([64]), [Span(0, 8, 8, False)], np.array([0]), 1.0, None)
    rows, columns = np.divmod(route.stages[1].active_K.numpy(), 8)
    assert set(rows) == set(columns) == {0, 2, 4, 6}


def test_tokens_with_a_loss_may_not_be_dropped_for_good():
    with pytest.raises(ConfigError, match="routing.generation: late_drop drops tokens before their loss"):
        RoutingPlan(Dense(), LateDrop(policy="late_drop", after_layer=2), 4, Schedule(1, 0, 0))


def test_a_policy_that_does_not_fit_the_model():
    with pytest.raises(ConfigError, match="late_drop.after_layer is 4"):
        RoutingPlan(LateDrop(policy="late_drop", after_layer=4), Dense(), 4, Schedule(1, 0, 0))
    with pytest.raises(ConfigError, match="at least 3 layers"):
        RoutingPlan(RandomLTD(policy="random_ltd", keep_ratio=0.5), Dense(), 2, Schedule(1, 0, 0))


def test_at_strength_zero_the_cost_is_the_dense_one():
    layout = Layout(40, 5, ((16, 0), (9, 1)))
    routed, dense = costing("random_ltd", strength=0.0), costing("dense")
    assert routed.flops(layout, 0).sum() == dense.flops(layout, 0).sum() == dense.dense_flops(layout)
    assert costing("random_ltd").flops(layout, 0).sum() < dense.dense_flops(layout)
