"""Phases: what a recipe lists becomes steps, plans and costs; a warm-up and a dense finish are two special cases."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megavlm.data.pack.pack import Costing, build_pack
from megavlm.errors import ConfigError
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.parts.parts import Parts
from megavlm.routing.config import DENSE, PhaseConfig, RoutingConfig
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense, LateDrop, Pyramid, RandomLTD, SharedBypass, Tread
from tests.routing.layouts import NUM_LAYERS, POLICIES, SHAPE, VOCABULARY, make_samples

LTD, TREAD = RandomLTD(keep_ratio=0.25), Tread(keep_ratio=0.5, first_layer=1, end_layer=3)
MIXED = [[("image", 4, 4), ("text", 3, 1), ("TEXT", 2, 1)], [("text", 3, 1), ("IMAGE", 3, 4)], [("TEXT", 5, 1)]]


def of(*phases: PhaseConfig, num_steps: int) -> Phases:
    return Phases(RoutingConfig(phases=list(phases)).phases_in(num_steps), NUM_LAYERS)


def strengths(routing: RoutingConfig, num_steps: int, steps) -> list[float]:
    phases = Phases(routing.phases_in(num_steps), NUM_LAYERS)
    return [phases.moment(step).strength for step in steps]


def test_a_run_without_phases_warms_up_and_finishes_dense():
    routing = RoutingConfig(understanding=LTD, warmup_fraction=0.1, dense_finish_fraction=0.2)
    assert strengths(routing, 100, (0, 5, 10, 79, 80, 99)) == [0, 0.5, 1, 1, 0, 0]
    assert Phases(routing.phases_in(100), NUM_LAYERS).first_steps == [0, 80]
    assert strengths(RoutingConfig(understanding=LTD), 100, (0, 99, 100)) == [1, 1, 1]
    assert strengths(RoutingConfig(understanding=LTD, dense_finish_fraction=1.0), 100, (0, 99)) == [0, 0]


@given(num_steps=st.integers(1, 10_000), cuts=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_phases_follow_each_other_over_all_steps(num_steps, cuts):
    listed = [PhaseConfig(fraction=cut / sum(cuts)) for cut in cuts]
    phases = RoutingConfig(phases=listed).phases_in(num_steps)
    assert phases[0].first_step == 0 and phases[-1].end_step == num_steps
    assert all(one.end_step == other.first_step for one, other in pairwise(phases))
    for phase in phases:
        exact = num_steps * listed[int(phase.place.rsplit(".", 1)[1])].fraction
        assert abs(phase.end_step - phase.first_step - exact) <= 1 + 1e-9


def test_a_phase_has_its_policies_and_its_own_warm_up():
    phases = of(
        PhaseConfig(fraction=0.5, understanding=LTD),
        PhaseConfig(fraction=0.3, generation=TREAD, warmup_fraction=0.5),
        PhaseConfig(fraction=0.2),
        num_steps=40,
    )
    assert phases.first_steps == [0, 20, 32]
    assert [phases.number(step) for step in (0, 19, 20, 31, 32, 39, 1000)] == [0, 0, 1, 1, 2, 2, 2]
    assert [phases.moment(step).strength for step in (0, 20, 23, 26, 31)] == [1, 0, 0.5, 1, 1]
    kept = [phases.plans[n].kept_tokens([16, 16], [0, 1], 1.0) for n in range(3)]
    assert kept[0][1:3, 0].tolist() == [4, 4] and (kept[0][:, 1] == 16).all()
    assert kept[1][1:3, 1].tolist() == [8, 8] and (kept[1][:, 0] == 16).all()
    assert (kept[2] == 16).all()


def test_all_phases_have_the_stages_of_all():
    """So costs, counts and their curves have the same entries over the whole run."""
    phases = of(PhaseConfig(fraction=0.5, understanding=LateDrop(after_layer=3)), PhaseConfig(fraction=0.5, generation=TREAD), num_steps=4)
    assert [plan.bounds for plan in phases.plans] == [[(0, 1), (1, 3), (3, 4)]] * 2
    costing = Costing(phases, SHAPE)
    assert {len(costing.flops(sample.layout, step)) for sample in make_samples(MIXED) for step in range(4)} == {4}


def assert_same_loss(first, second, phases):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "head_dim": 8}
    causal_lm = make_causal_lm({"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2} | sizes, VOCABULARY)
    backbone = Backbone(causal_lm, phases, num_sources=1, max_labels=200, chunk_rows=64)
    found = []
    for pack in (first, second):
        backbone.zero_grad()
        sums = backbone(pack)
        sums.sum().backward()
        found.append([sums.detach(), *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "dense"])
def test_stages_that_other_phases_ask_for_change_nothing(policy):
    """A stage may begin anywhere: the same tokens, the same loss and gradients, bit for bit, the same costs."""
    alone = Phases.always(*POLICIES[policy], NUM_LAYERS)
    understanding, generation = POLICIES[policy]
    several = of(
        PhaseConfig(fraction=0.5, understanding=understanding, generation=generation),
        PhaseConfig(fraction=0.5, understanding=LTD),
        num_steps=2,
    )
    assert several.num_stages == NUM_LAYERS
    packs = [build_pack(make_samples(MIXED), Costing(phases, SHAPE), 1, 0, step=0, seed=0) for phases in (alone, several)]
    assert packs[0].flops.sum() == pytest.approx(packs[1].flops.sum(), rel=1e-12)
    assert_same_loss(*packs, several)


def test_a_list_of_phases_gives_the_packs_of_a_warm_up_and_a_dense_finish(make_config):
    policies = {"understanding": {"policy": "pyramid"}, "generation": {"policy": "tread", "first_layer": 1, "end_layer": 3}}
    short = policies | {"warmup_fraction": 0.25, "dense_finish_fraction": 0.25}
    listed = {"phases": [{"fraction": 0.75, "warmup_fraction": 1 / 3} | policies, {"fraction": 0.25}]}
    lanes = [Parts(make_config({"routing": routing, "optimizer.num_steps": 12})).with_mixture().make_lane(1) for routing in (short, listed)]
    for step in range(12):
        (one, state), (other, same_state) = (next(lane) for lane in lanes)
        assert one.keys == other.keys and state == same_state
        assert (one.task_flops == other.task_flops).all() and (one.kept_tokens == other.kept_tokens).all()
        for a, b in zip(one.route.stages, other.route.stages, strict=True):
            assert (a.first_layer, a.end_layer, a.sequences.lengths) == (b.first_layer, b.end_layer, b.sequences.lengths)
            assert (a.active_K is None) == (b.active_K is None) and (a.active_K is None or a.active_K.equal(b.active_K)), step


def test_packs_are_built_to_the_cost_of_their_phase(make_config):
    """At a switch the look-ahead is priced anew: no pack is filled by the costs of the phase before."""
    bypass = {"policy": "shared_bypass", "keep_ratio": 0.1}
    phases = [{"fraction": 0.5, "understanding": bypass, "generation": bypass}, {"fraction": 0.5}]
    lane = Parts(make_config({"routing": {"phases": phases}, "optimizer.num_steps": 8})).with_mixture().make_lane(0)
    packs = [next(lane)[0] for _ in range(8)]
    shares = np.array([pack.flops.sum() / pack.dense_flops.sum() for pack in packs])
    assert (shares[:4] < 0.7).all() and (shares[4:] == 1).all()


def test_what_the_model_is_judged_along():
    """The policies of the last phase that has any."""
    first, second = PhaseConfig(fraction=0.5, understanding=LTD), PhaseConfig(fraction=0.25, generation=TREAD)
    finish = PhaseConfig(fraction=0.25)
    assert RoutingConfig(phases=[first, second, finish]).trained == (Dense(), TREAD)
    assert RoutingConfig(phases=[finish, finish]).trained == DENSE
    assert RoutingConfig(understanding=LTD, dense_finish_fraction=0.5).trained == (LTD, Dense())


def test_one_task_alone_keeps_the_phases():
    routing = RoutingConfig(phases=[PhaseConfig(fraction=0.5, understanding=LTD, generation=TREAD), PhaseConfig(fraction=0.5)])
    only = routing.only("generation")
    assert [phase.policies for phase in only.phases_in(10)] == [(Dense(), TREAD), DENSE]


def test_a_policy_that_does_not_fit_is_refused_with_its_phase():
    with pytest.raises(ConfigError, match=r"^routing\.phases\.1\.generation: pyramid drops tokens before their loss"):
        of(PhaseConfig(fraction=0.5), PhaseConfig(fraction=0.5, generation=Pyramid()), num_steps=4)
    with pytest.raises(ConfigError, match=r"^routing\.phases\.0: shared_bypass\.end_layer is 9"):
        of(PhaseConfig(fraction=1.0, understanding=SharedBypass(end_layer=9)), num_steps=4)


def test_the_step_that_is_simulated_is_one_of_the_longest_routed_phase():
    assert of(PhaseConfig(fraction=0.2, understanding=LTD), PhaseConfig(fraction=0.8), num_steps=100).typical_step == 10
    assert Phases(RoutingConfig(understanding=LTD, warmup_fraction=0.2).phases_in(100), NUM_LAYERS).typical_step == 60
    assert Phases(RoutingConfig().phases_in(100), NUM_LAYERS).typical_step == 50


@pytest.mark.parametrize(
    ("routing", "num_steps", "message"),
    [
        ({"phases": [{"fraction": 0.5}, {"fraction": 0.4}]}, 10, "routing.phases: their fractions add up to 0.9; make it 1"),
        ({"phases": [{"fraction": 0.99}, {"fraction": 0.01}]}, 10, "routing.phases.1.fraction: 0.01 of 10 steps .* is no step"),
        ({"phases": [{"fraction": 0}]}, 10, "routing.phases.0.fraction: Input should be greater than 0"),
        (
            {"phases": [{"fraction": 1}], "dense_finish_fraction": 0.1, "understanding": {"policy": "late_drop", "after_layer": 1}},
            10,
            "routing.phases: the run has a list of phases, and routing.understanding and routing.dense_finish_fraction beside it",
        ),
        (
            {"phases": [{"fraction": 1, "optimizer": {"warmup_steps": 11}}]},
            10,
            "routing.phases.0.optimizer.warmup_steps: the warm-up of 11",
        ),
        ({"phases": [{"share": 1}]}, 10, "routing.phases.0.share: there is no such setting"),
        (
            {"phases": [{"fraction": 1, "generation": {"policy": "shared_bypas"}}]},
            10,
            "routing.phases.0.generation.policy: there is no 'shared",
        ),
        (
            {"phases": [{"fraction": 0.5}, {"fraction": 0.5, "optimizer": {}}]},
            3,
            "optimizer.warmup_steps: the warm-up of 2 steps is longer than",
        ),
    ],
)
def test_what_is_refused_when_the_recipe_is_read(make_config, routing, num_steps, message):
    with pytest.raises(ConfigError, match=message):
        make_config({"routing": routing, "optimizer.num_steps": num_steps})


def test_thirds_may_be_rounded(make_config):
    config = make_config({"routing": {"phases": [{"fraction": 0.333}] * 3}, "optimizer.num_steps": 9000})
    assert [(phase.first_step, phase.end_step) for phase in config.routing.phases_in(9000)] == [(0, 2997), (2997, 5994), (5994, 9000)]
