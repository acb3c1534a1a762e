import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.pack.encode import Layout, Span
from megavlm.errors import ConfigError
from megavlm.routing.builder import build_route
from megavlm.routing.plan import RoutingPlan, Schedule, num_kept
from megavlm.routing.policies import Dense, LateDrop, Merge, Pyramid, RandomLTD, SharedBypass, Tread
from megavlm.routing.route import PackLayout
from megavlm.routing.tasks import Task
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
        num_layers = stage.end_layer - stage.first_layer
        if not stage.injections and "merge" not in policy:
            assert flops == num_layers * SHAPE.layers_flops(lengths).sum()
        num_open = sum(sum(choice.kept) for choice in stage.choices)
        num_injected = sum(len(injection.rows_R) for injection in stage.injections if injection.task == Task.GENERATION)
        fixed = np.arange(pack.num_tokens) if stage.active_K is None else stage.active_K.numpy()
        assert (np.diff(fixed) > 0).all() and len(fixed) + num_open == sum(lengths)
        # whole pack minus image tokens that are not kept and prompts that are injected
        assert pack.num_tokens - sum(lengths) == pack.image_tokens.sum() - kept.sum() + num_injected


@EVERY_POLICY
@settings(deadline=None, max_examples=50)
@given(layout=LAYOUTS)
def test_only_image_tokens_and_prompts_leave_and_tokens_with_a_loss_come_back(policy, layout):
    pack = make_pack(layout, policy)
    may_leave, is_drawn = np.zeros(pack.num_tokens, bool), np.zeros(pack.num_tokens, bool)
    offset = 0
    for sample in make_samples(layout):
        for span in sample.spans:
            rows = slice(offset + span.start, offset + span.start + span.length)
            may_leave[rows], is_drawn[rows] = True, span.has_loss
        may_leave[offset + sample.prompt_places] = True
        offset += sample.num_tokens
    may_leave[pack.rows_M[~torch.from_numpy(is_drawn)[pack.rows_M]].numpy()] = False
    for stage in pack.route.stages:
        # rows that a choice may take are open: neither absent for sure nor present
        is_open = np.zeros(pack.num_tokens, bool)
        for choice in stage.choices:
            is_open[pack.route.candidates[choice.task].rows_C.numpy()] = True
        is_absent = ~is_open
        is_absent[np.arange(pack.num_tokens) if stage.active_K is None else stage.active_K.numpy()] = False
        assert not (is_absent & ~may_leave).any()
        if stage.end_layer == NUM_LAYERS:
            assert not ((is_absent | is_open) & is_drawn).any()


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
    policy = RandomLTD(keep_ratio=0.25, selector="stride")
    plan = RoutingPlan(policy, Dense(), NUM_LAYERS, Schedule(1, 0, 0))
    layout = PackLayout(np.array([64]), [Span(0, 8, 8, False)], np.array([0]), np.array([64]), np.zeros(0, np.int64))
    route = build_route(plan, layout, 1.0, None)
    rows, columns = np.divmod(route.stages[1].active_K.numpy(), 8)
    assert set(rows) == set(columns) == {0, 2, 4, 6}


def test_tokens_with_a_loss_may_not_be_dropped_for_good():
    with pytest.raises(ConfigError, match="routing.generation: late_drop drops tokens before their loss"):
        RoutingPlan(Dense(), LateDrop(after_layer=2), 4, Schedule(1, 0, 0))


def test_a_policy_that_does_not_fit_the_model():
    with pytest.raises(ConfigError, match="late_drop.after_layer is 4"):
        RoutingPlan(LateDrop(after_layer=4), Dense(), 4, Schedule(1, 0, 0))
    with pytest.raises(ConfigError, match="at least 3 layers"):
        RoutingPlan(RandomLTD(keep_ratio=0.5), Dense(), 2, Schedule(1, 0, 0))


def test_at_strength_zero_the_cost_is_the_dense_one():
    layout = Layout(40, 5, 3, ((16, 0), (9, 1)))
    routed, dense = costing("random_ltd", strength=0.0), costing("dense")
    assert routed.flops(layout, 0).sum() == dense.flops(layout, 0).sum() == dense.dense_flops(layout)
    assert costing("random_ltd").flops(layout, 0).sum() < dense.dense_flops(layout)


@pytest.mark.parametrize(
    ("understanding", "generation", "message"),
    [
        (Dense(), RandomLTD(keep_ratio=0.5, selector="key_norm"), "looks at what the model must predict"),
        (Dense(), Merge(at_layer=1), "merge would mix"),
        (Dense(), Pyramid(), "drops tokens before their loss"),
        (SharedBypass(), SharedBypass(end_layer=-2), "one block of layers for understanding and another"),
        (Tread(first_layer=0, end_layer=2, selector="key_norm"), Dense(), "the first layer has none"),
    ],
)
def test_policies_that_do_not_fit_their_task(understanding, generation, message):
    with pytest.raises(ConfigError, match=message):
        RoutingPlan(understanding, generation, 4, Schedule(1, 0, 0))


def test_a_pyramid_only_ever_loses_tokens():
    stages = make_pack([[("image", 4, 4), ("TEXT", 1, 1)]], "pyramid").route.stages
    sets = [set(range(20)) if s.active_K is None else set(s.active_K.tolist()) for s in stages]
    assert [len(x) for x in sets] == [20, 12, 8, 6] and sets[0] > sets[1] > sets[2] > sets[3]
