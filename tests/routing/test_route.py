import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.pack.encode import Layout, Span
from megavlm.data.pack.pack import Costing
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts
from megavlm.routing.builder import build_route
from megavlm.routing.phases import Phases
from megavlm.routing.plan import RoutingPlan, num_kept
from megavlm.routing.policies import PARTIAL, Dense, LateDrop, Merge, Pyramid, RandomLTD, SharedBypass, Tread, VisibleBypass
from megavlm.routing.route import PackLayout
from megavlm.routing.selectors import stratified
from megavlm.routing.tasks import Task
from tests.routing.layouts import LAYOUTS, NUM_LAYERS, POLICIES, SHAPE, costing, make_pack, make_samples
from tests.routing.odd import Odd

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
        opened = [(choice.plan.how, sum(choice.kept)) for choice in stage.choices]
        num_open = sum(num for _, num in opened)
        # rows of a stage that do part of it
        asking = sum(lengths) if stage.asking_K is None else len(stage.asking_K) + sum(num for how, num in opened if how != "skip_mlp")
        through_mlp = sum(lengths) if stage.mlp_K is None else len(stage.mlp_K) + num_open
        if not stage.injections and "merge" not in policy:
            saved = SHAPE.asking_flops_per_token * (sum(lengths) - asking) + SHAPE.mlp_flops_per_token * (sum(lengths) - through_mlp)
            assert flops == num_layers * (SHAPE.layers_flops(lengths).sum() - saved)
        num_injected = sum(len(injection.rows_R) for injection in stage.injections if injection.task == Task.GENERATION)
        fixed = np.arange(pack.num_tokens) if stage.active_K is None else stage.active_K.numpy()
        num_left_open = sum(num for how, num in opened if how not in PARTIAL)
        assert (np.diff(fixed) > 0).all() and len(fixed) + num_left_open == sum(lengths)
        # whole pack minus image tokens that are not kept and prompts that are injected
        assert pack.num_tokens - through_mlp == pack.image_tokens.sum() - kept.sum() + num_injected


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
    plan = RoutingPlan(policy, Dense(), NUM_LAYERS)
    layout = PackLayout(np.array([64]), [Span(0, 8, 8, False)], np.array([0]), np.array([64]), np.zeros(0, np.int64))
    route = build_route(plan, layout, 1.0, None)
    rows, columns = np.divmod(route.stages[1].active_K.numpy(), 8)
    assert set(rows) == set(columns) == {0, 2, 4, 6}


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 6), (2, 2)])
def test_stratified_keeps_one_of_every_two_by_two_and_draws_anew(height, width):
    rng, masks = np.random.default_rng(0), []
    for share in (1 / 4, 1 / 2, 3 / 4) * 5:
        kept = np.argsort(stratified(height, width, rng))[: num_kept(np.array([height * width]), np.array([share]))[0]]
        is_kept = np.zeros(height * width, bool)
        is_kept[kept] = True
        cells = is_kept.reshape(height // 2, 2, width // 2, 2).sum((1, 3))
        assert (cells == 4 * share).all()
        masks.append(is_kept.tobytes())
    assert len(set(masks)) > 3
    assert sorted(np.argsort(stratified(3, 5, rng))) == list(range(15))


def test_tokens_with_a_loss_may_not_be_dropped_for_good():
    with pytest.raises(ConfigError, match="routing.generation: late_drop drops tokens before their loss"):
        RoutingPlan(Dense(), LateDrop(after_layer=2), 4)


def test_a_policy_that_does_not_fit_the_model():
    with pytest.raises(ConfigError, match="late_drop.after_layer is 4"):
        RoutingPlan(LateDrop(after_layer=4), Dense(), 4)
    with pytest.raises(ConfigError, match="at least 3 layers"):
        RoutingPlan(RandomLTD(keep_ratio=0.5), Dense(), 2)


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
        (SharedBypass(), SharedBypass(end_layer=-2), "shared_bypass has one block of layers for understanding and another"),
        (VisibleBypass(), VisibleBypass(first_layer=2), "visible_bypass has one block of layers for understanding and another"),
        (Dense(), VisibleBypass(end_layer=4), "visible_bypass drops tokens before their loss"),
        (Tread(first_layer=0, end_layer=2, selector="key_norm"), Dense(), "the first layer has none"),
    ],
)
def test_policies_that_do_not_fit_their_task(understanding, generation, message):
    with pytest.raises(ConfigError, match=message):
        RoutingPlan(understanding, generation, 4)


def test_a_pyramid_only_ever_loses_tokens():
    stages = make_pack([[("image", 4, 4), ("TEXT", 1, 1)]], "pyramid").route.stages
    sets = [set(range(20)) if s.active_K is None else set(s.active_K.tolist()) for s in stages]
    assert [len(x) for x in sets] == [20, 12, 8, 6] and sets[0] > sets[1] > sets[2] > sets[3]


ALL, FEW = (1.0, 0, False, "select"), (0.4, 1, False, "select")


@pytest.mark.parametrize(
    ("plans", "selector", "message"),
    [
        ([ALL, FEW, ALL], "random", "has plans for 3 layers, the model has 4"),
        ([ALL, (1.5, 1, False, "select"), ALL, ALL], "random", "layer 1: keep_ratio is 1.5"),
        ([ALL, FEW, (0.5, 2, True, "select"), ALL], "random", "layer 2: nested=True keeps a share of what the layer before has, but 0.5"),
        ([ALL, FEW, (1.0, 2, True, "select"), ALL], "redundancy", "layer 2: nested=True keeps a share"),
        ([ALL, (0.5, 1, False, "gate"), (0.5, 2, True, "select"), ALL], "random", "layer 2: nested=True after a layer with gate"),
        ([ALL, (0.5, 1, True, "gate"), ALL, ALL], "random", "layer 1: gate does not rank"),
        ([ALL, (0.5, 1, False, "inject"), ALL, ALL], "random", "layer 1: injected tokens do not travel"),
        ([ALL, (0.3, 1, False, "merge")] + [(0.3, 1, False, "merge")] * 2, "random", "at most every second one merges"),
        ([(0.5, 1, False, "merge")] * 4, "random", "merges from layer 0 on, but not once and for good"),
        ([ALL, (0.7, 1, False, "merge"), *[(0.5, 1, False, "merge")] * 2], "random", "not once and for good"),
        ([ALL, (0.5, 1, False, "merge"), ALL, ALL], "random", "not once and for good"),
        ([ALL, FEW, *[(0.5, 1, False, "merge")] * 2], "random", "not once and for good"),
        ([(0.0, 0, False, "select"), ALL, FEW, FEW], "key_norm", "the first layer has none"),
    ],
)
def test_users_policies_that_nothing_can_compute_are_refused_by_name(plans, selector, message):
    with pytest.raises(ConfigError, match=message):
        RoutingPlan(Odd(plans=plans, selector=selector), Dense(), 4)


@pytest.mark.parametrize("policy", ["pyramid_question", "pyramid_redundancy", "ltd_key_norm", "merge"])
def test_the_device_decides_nothing_where_everything_is_kept(policy):
    """At strength 0 nothing is ranked, watched, merged or paid for."""
    pack = make_pack([[("image", 4, 4), ("text", 2, 1), ("TEXT", 1, 1)]], policy, strength=0.0)
    for stage in pack.route.stages:
        assert stage.active_K is None and not stage.choices and not stage.is_watched and stage.split is None
    assert pack.flops.sum() == pack.dense_flops.sum()


def test_a_merge_is_paid_for_where_tokens_merge_only():
    """By the samples in which they do, in costs and in attention."""
    merging, other = [("image", 2, 2), ("TEXT", 2, 1)], [("image", 1, 1), ("TEXT", 3, 1)]
    pack = make_pack([merging, other, [("text", 5, 1)]], "merge")
    after = pack.route.stages[1]
    assert after.split.merged.lengths == [7] and after.split.others.lengths == [7, 6]
    assert make_pack([other], "merge").flops.sum() == make_pack([other], "dense").flops.sum()
    assert make_pack([merging], "merge").route.stages[1].split is None
    layout = make_samples([merging])[0].layout
    everything = Costing(Phases.always(Merge(at_layer=1, keep_ratio=1.0), Dense(), NUM_LAYERS), SHAPE)
    assert everything.flops(layout, 0).sum() == everything.dense_flops(layout)


def test_a_merge_that_no_kernel_takes_is_refused():
    def merging(keep_ratio):
        return RoutingPlan(Merge(at_layer=1, keep_ratio=keep_ratio), Dense(), 4)

    merging(0.5).check_head_width(248)
    merging(1.0).check_head_width(256)
    with pytest.raises(ConfigError, match="kernels take at most 256"):
        merging(0.5).check_head_width(256)


def test_a_merge_that_no_kernel_takes_is_refused_when_the_recipe_is_read(make_config):
    config = make_config({"routing.understanding": {"policy": "merge", "at_layer": 1}, "model.architecture.head_dim": 256})
    with pytest.raises(ConfigError, match="256 wide"):
        _ = Parts(config).phases


def test_two_images_before_one_question():
    """Neither is part of the other's question."""
    pack = make_pack([[("image", 1, 2), ("image", 2, 2), ("text", 3, 1), ("TEXT", 1, 1)]], "pyramid_question")
    among = pack.route.candidates[0]
    questions = [among.question_rows_Q[among.question_span_Q == n].tolist() for n in range(2)]
    # <bos>, <boi> 2 3 <eoi>, <boi> 6 7 8 9 <eoi>, text
    assert questions == [[4, 5, 10, 11, 12, 13], [10, 11, 12, 13]]


def test_every_gated_layer_decides_for_itself():
    """Whatever the other task does in these layers."""
    gates = Odd(plans=[ALL, (0.5, 1, False, "gate"), (0.5, 1, False, "gate"), ALL])
    for other in (Dense(), Tread(first_layer=2, end_layer=3)):
        plan = RoutingPlan(gates, other, 4)
        assert plan.bounds == [(0, 1), (1, 2), (2, 3), (3, 4)]
