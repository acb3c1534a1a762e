"""The probe on models where the answer is known, and the route that it suggests."""

import numpy as np
import pytest
import torch
import yaml

from megavlm.analysis.probe import Away, Probe
from megavlm.analysis.subject import first_samples
from megavlm.analysis.suggest import suggest
from megavlm.config import load_config
from megavlm.errors import MegavlmError
from megavlm.parts.parts import Parts
from megavlm.routing.policies import Dense, LateDrop

RATIOS = (0.25, 0.5)


@pytest.fixture
def make_probe(make_config):
    def make(deaf_from: int = 4, **weights):
        """A model whose layers from ``deaf_from`` on bring nothing from other tokens."""
        config = Parts(make_config()).with_mixture().config
        torch.manual_seed(0)
        causal_lm = Parts(config).make_causal_lm()
        for parameter in causal_lm.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        for layer in causal_lm.model.layers[deaf_from:]:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        backbone = Parts(config).make_backbone(causal_lm)
        costing = Parts(config).inference_costing
        return Probe(
            backbone,
            costing.shape,
            first_samples(Parts(config), 2),
            2,
            task_weights={"understanding": 0.1} | weights,
            device=torch.device("cpu"),
        )

    return make


def test_images_may_leave_where_no_layer_listens(make_probe):
    """Known answer: from layer 2 on nothing is brought, so leaving after 2 or 3 layers costs exactly nothing, and after 1 it does."""
    curve = [c for c in make_probe(deaf_from=2).curves() if c.task == "understanding"]
    assert [c.layer for c in curve] == [1, 2, 3]
    assert curve[0].rise_t[0] != 0 and [abs(c.rise_t[0]) < 1e-6 for c in curve] == [False, True, True]
    # what is drawn misses the MLPs of the layers that it skips
    assert all((c.rise_t[1] == 0) and c.saved_flops > 0 for c in curve)


def test_the_probe_is_deterministic_and_each_kind_touches_its_own_samples(make_probe):
    first, second = ([*probe.curves(), *probe.bypasses(RATIOS)] for probe in (make_probe(), make_probe()))
    assert len(first) == 3 + 2 + 2 * 2 * 2
    for one, two in zip(first, second, strict=True):
        assert one.policy == two.policy and one.rise_t.tolist() == two.rise_t.tolist()
        t = ("understanding", "generation").index(one.task)
        assert one.rise_t[t] != 0 and one.rise_t[1 - t] == 0
        assert one.weighted_rise == pytest.approx((0.1, 1.0)[t] * one.rise_t[t])


def test_drawn_images_are_away_from_their_layer_to_the_last(make_probe):
    probe = make_probe()
    (pack, *_) = probe.packs(probe.groups, Dense(), Away(first_layer=1))
    images = [sum(stage.sequences.lengths) for stage in pack.route.stages]
    assert [(s.first_layer, s.end_layer) for s in pack.route.stages] == [(0, 1), (1, 3), (3, 4)]
    assert images[0] == images[2] == pack.num_tokens and images[1] == pack.num_tokens - pack.image_tokens[1]


def test_savings_are_the_costs_and_add_up(make_probe):
    probe = make_probe()
    by = {(c.task, c.layer): c for c in probe.curves()}
    read, drawn = by["understanding", 1], by["generation", 1]
    share = probe.flops_share(LateDrop(after_layer=1), Away(first_layer=1))
    assert share == pytest.approx(1 - (read.saved_flops + drawn.saved_flops) / probe.dense.dense_flops)
    assert probe.flops_share(Dense(), Dense()) == pytest.approx(1)
    assert read.rise_per_saved_exaflop == pytest.approx(1e18 * read.weighted_rise / read.saved_flops)


@pytest.mark.parametrize("shared", [False, True])
def test_the_suggestion_meets_its_target_at_the_least_rise_and_loads(make_probe, make_config, tmp_path, shared):
    probe = make_probe()
    candidates = [*probe.curves(), *probe.bypasses(RATIOS)]
    rises = []
    for target in (1.0, 0.9, 0.75):
        chosen = suggest(probe, candidates, target, shared)
        exact = probe.flops_share(chosen.understanding, chosen.generation)
        assert chosen.flops_share == exact <= target
        rises.append(chosen.weighted_rise)
        recipe = yaml.safe_load(yaml.safe_dump(make_config().model_dump(mode="json")))
        recipe["routing"] = yaml.safe_load(chosen.recipe())["routing"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        config = load_config(str(tmp_path / "recipe.yaml"))
        assert (config.routing.understanding, config.routing.generation) == (chosen.understanding, chosen.generation)
        phases = Parts(config).phases
        assert phases.num_stages >= 1
        if shared:
            assert {chosen.understanding.policy, chosen.generation.policy} == {"shared_bypass"}
    assert rises == sorted(rises), "a tighter target cannot cost less"


def test_the_best_of_all_pairs_is_taken(make_probe):
    """Against brute force over every pair of policies, with exact shares."""
    probe = make_probe()
    candidates = [*probe.curves(), *probe.bypasses((0.5,))]
    read = [(Dense(), 0.0)] + [(c.policy, c.weighted_rise) for c in candidates if c.task == "understanding"]
    drawn = [(Dense(), 0.0)] + [
        (c.policy, c.weighted_rise) for c in candidates if c.task == "generation" and not isinstance(c.policy, Away)
    ]
    rises = [a + b for u, a in read for g, b in drawn if probe.flops_share(u, g) <= 0.75]
    assert suggest(probe, candidates, 0.75).weighted_rise == pytest.approx(min(rises))


def test_a_target_out_of_reach_is_refused_with_what_is_in_reach(make_probe):
    probe = make_probe()
    candidates = [*probe.curves(), *probe.bypasses((0.5,))]
    with pytest.raises(MegavlmError, match=r"the least is (\d+\.\d)%"):
        suggest(probe, candidates, 0.05)


def test_samples_with_both_kinds_of_images_count_once(make_probe):
    """All samples of the probe's packs, and no more, are in the dense loss."""
    probe = make_probe()
    labels = sum(sample.has_loss.sum() for group in probe.groups for sample in group)
    assert probe.dense.labels_t.sum() == labels and np.isnan(probe.dense.losses_t[2])
