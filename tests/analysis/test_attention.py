"""Attention allocation against full attention matrices, and where the answer is known."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megavlm.analysis.attention import STATISTICS, AttentionWatch, statistics
from megavlm.analysis.rows import IMAGE, QUERIES, SINK, SPECIAL, TEXT, token_kinds
from megavlm.data.pack.pack import build_pack
from megavlm.model.attention import NAME
from megavlm.routing.tasks import TASKS
from tests.model.reference import Reference, recorded_chance
from tests.model.test_backbone import MIXED, NoReadBack, make_backbone
from tests.routing.layouts import POLICIES, SHAPE, VOCABULARY, costing, make_samples

VOCAB = SimpleNamespace(num_text=70, first_code=80, end_code=VOCABULARY, is_text=lambda ids: ids < 70)
EVERYTHING = {"num_rows": 10_000, "num_sequences": 10_000}


def with_kinds(samples):
    """The same layouts with ids of their kind: text, specials around images, codes."""
    changed = []
    for sample in samples:
        tokens = sample.tokens % VOCAB.num_text
        for span in sample.spans:
            tokens[span.start - 1] = tokens[span.start + span.length] = VOCAB.num_text
            here = slice(span.start, span.start + span.length)
            tokens[here] = VOCAB.first_code + sample.tokens[here] % (VOCABULARY - VOCAB.first_code)
        changed.append(replace(sample, tokens=tokens))
    return changed


def watched(backbone, pack, train=False, **sampling):
    watch = AttentionWatch(SHAPE, VOCAB, seed=0, **sampling)
    with watch.on(backbone, pack):
        sums = backbone(pack)
    if train:
        sums.sum().backward()
    return watch


def naive(weights_LHTT, samples, seen_LT):
    """(task, query, layer) → mean of the statistics over heads and queries, by loops over full matrices."""
    found, offset = {}, 0
    for sample in samples:
        kinds = token_kinds(sample.tokens, VOCAB)
        kinds[0] = SINK
        for layer, weights_HTT in enumerate(weights_LHTT):
            for row in range(sample.num_tokens):
                if kinds[row] >= len(QUERIES) or not seen_LT[layer][offset + row]:
                    continue
                key = (TASKS[sample.task], QUERIES[kinds[row]], layer)
                for weights in weights_HTT[:, offset + row, offset : offset + sample.num_tokens].double().numpy():
                    p = weights[weights > 0]
                    stats = [weights[kinds == kind].sum() for kind in (TEXT, IMAGE, SPECIAL, SINK)] + [-(p * np.log(p)).sum()]
                    image = weights[kinds == IMAGE]
                    image = image[image > 0] / max(image.sum(), 1e-300)
                    stats.append(np.exp(-(image * np.log(image)).sum()) if len(image) else np.nan)
                    found.setdefault(key, []).append(stats)
        offset += sample.num_tokens
    return {key: np.concatenate([np.mean(rows, 0)[:-1], [_mean(np.array(rows)[:, -1])]]) for key, rows in found.items()}


def _mean(values):
    return np.nanmean(values) if not np.isnan(values).all() else np.nan


def assert_equals_naive(watch, expected):
    shares = watch.shares()
    assert {(task, query) for task, query, _ in expected} == set(shares)
    for (task, query, layer), values in expected.items():
        got = shares[task, query].mean_XL[:, layer]
        np.testing.assert_allclose(got, values, rtol=2e-5, atol=2e-6, err_msg=f"{task} {query} {layer} {STATISTICS}")


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_sampled_rows_equal_eager_attention_of_transformers(model_type):
    """Every row, sample by sample, against the matrices that transformers' own eager attention returns."""
    samples, backbone = with_kinds(make_samples(MIXED)), make_backbone(model_type=model_type)
    watch = watched(backbone, build_pack(samples, costing("dense"), 1, 0, step=0, seed=0), **EVERYTHING)
    num = sum(sample.num_tokens for sample in samples)
    weights_LHTT, offset, lm = torch.zeros(SHAPE.num_layers, SHAPE.num_heads, num, num), 0, backbone.causal_lm
    lm.config._attn_implementation = lm.model.config._attn_implementation = "eager"
    for sample in samples:
        here = slice(offset, offset := offset + sample.num_tokens)
        seen = lm(input_ids=torch.from_numpy(sample.tokens)[None], output_attentions=True, use_cache=False).attentions
        weights_LHTT[:, :, here, here] = torch.cat(seen).float().detach()
    lm.config._attn_implementation = lm.model.config._attn_implementation = NAME
    assert_equals_naive(watch, naive(weights_LHTT, samples, np.ones((SHAPE.num_layers, num), bool)))


@pytest.mark.parametrize(
    "policy", [p for p in POLICIES if p not in ("dense", "shared_bypass_stride", "one_kept", "visible_bypass_question")]
)
def test_rows_are_those_of_the_stage_when_a_route_is_active(policy):
    """Against masks: choices on the device, merged tokens, injected keys and gates included."""
    samples, backbone = with_kinds(make_samples(MIXED)), make_backbone(policy)
    with recorded_chance() as drawn:
        pack = build_pack(samples, costing(policy), 1, 0, step=0, seed=0)
    watch = watched(backbone, pack, **EVERYTHING)
    masked = Reference(backbone, samples, POLICIES[policy], route=pack.route, drawn=drawn)
    masked.losses()
    of_layers = zip(*masked.attention)
    weights = [torch.stack([torch.block_diag(*(w[head] for w in seen)) for head in range(len(seen[0]))]) for seen in of_layers]
    assert_equals_naive(watch, naive(weights, samples, np.array([np.concatenate(active) for active in zip(*masked.active)])))


@pytest.mark.parametrize("policy", ["dense", "pyramid_question"])
def test_watching_changes_nothing_and_survives_recomputation(policy):
    samples = with_kinds(make_samples(MIXED))
    pack = build_pack(samples, costing(policy), 1, 0, step=0, seed=0)
    gradients, watches = [], []
    for options in ({}, {"activation_checkpointing": True}):
        backbone = make_backbone(policy, **options)
        for is_watched in (False, True):
            backbone.zero_grad()
            if is_watched:
                watches.append(watched(backbone, pack, train=True))
            else:
                backbone(pack).sum().backward()
            gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for others in gradients[1:]:
        assert all(a.equal(b) for a, b in zip(gradients[0], others, strict=True))
    first, second = (watch.shares() for watch in watches)
    for key, allocation in first.items():
        np.testing.assert_array_equal(allocation.groups_XLG, second[key].groups_XLG)


@pytest.mark.parametrize("policy", ["dense", "pyramid_question", "merge_and_injection"])
def test_watching_reads_nothing_back_from_the_device(policy):
    pack, backbone = build_pack(with_kinds(make_samples(MIXED)), costing(policy), 1, 0, step=0, seed=0), make_backbone(policy)
    watch = AttentionWatch(SHAPE, VOCAB, seed=0)
    with watch.on(backbone, pack), NoReadBack():
        backbone(pack).sum().backward()
    assert watch.shares()


def test_a_sample_of_the_rows_estimates_all_of_them():
    samples, backbone = with_kinds(make_samples([[("image", 4, 4), ("text", 9, 1), ("TEXT", 9, 1)]] * 12)), make_backbone()
    pack = build_pack(samples, costing("dense"), 1, 0, step=0, seed=0)
    everything, some = watched(backbone, pack, **EVERYTHING), watched(backbone, pack, num_rows=6, num_sequences=6)
    key = ("understanding", "text")
    assert some.shares()[key].queries == 6 * 6 * SHAPE.num_layers < everything.shares()[key].queries
    np.testing.assert_allclose(some.shares()[key].mean_XL[:4], everything.shares()[key].mean_XL[:4], atol=0.06)
    again = watched(backbone, pack, num_rows=6, num_sequences=6)
    np.testing.assert_array_equal(some.shares()[key].groups_XLG, again.shares()[key].groups_XLG)


def test_uniform_attention_is_told_as_uniform():
    """Queries of zero: every visible key gets 1/n. By hand for one sample: 1 sink, 2 specials, 6 image tokens, 5 texts."""
    (sample,) = with_kinds(make_samples([[("image", 2, 3), ("text", 3, 1), ("TEXT", 2, 1)]]))
    backbone = copy.deepcopy(make_backbone(model_type="llama"))
    for layer in backbone.causal_lm.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    got = watched(backbone, build_pack([sample], costing("dense"), 1, 0, step=0, seed=0), **EVERYTHING).shares()["understanding", "text"]
    lengths = np.arange(10, 15)  # keys that the five text rows see
    texts = np.arange(1, 6)
    expected = [np.mean(texts / lengths), np.mean(6 / lengths), np.mean(2 / lengths), np.mean(1 / lengths)]
    for layer in range(SHAPE.num_layers):
        for group in range(SHAPE.num_kv_heads):
            np.testing.assert_allclose(got.groups_XLG[:4, layer, group], expected, rtol=1e-5)
            assert got.groups_XLG[4, layer, group] == pytest.approx(np.mean(np.log(lengths)), rel=1e-5)
            assert got.groups_XLG[5, layer, group] == pytest.approx(6, rel=1e-5)


def test_everything_on_the_first_token_is_told_as_sink():
    kinds = torch.tensor([SINK, IMAGE, IMAGE, TEXT, SPECIAL])
    scores = torch.full((1, 1, 5), -1e4)
    scores[..., 0] = 0.0
    got = dict(zip(STATISTICS, statistics(scores, kinds)[0, 0].tolist()))
    assert got["sink"] == 1 and got["image"] == got["text"] == got["special"] == 0 and got["entropy"] == 0
    # even of vanishing attention on images it is known over how many of them it spreads
    assert got["effective_image_tokens"] == pytest.approx(2)
    scores[..., 1] = -5e3
    assert dict(zip(STATISTICS, statistics(scores, kinds)[0, 0].tolist()))["effective_image_tokens"] == pytest.approx(1)


def test_a_row_before_any_image_has_no_effective_number():
    (sample,) = with_kinds(make_samples([[("text", 3, 1), ("IMAGE", 2, 2)]]))
    backbone = make_backbone()
    got = watched(backbone, build_pack([sample], costing("dense"), 1, 0, step=0, seed=0), **EVERYTHING).shares()
    prompt, drawn = got["generation", "text"], got["generation", "image"]
    assert (prompt.mean_XL[1] == 0).all() and np.isnan(prompt.mean_XL[5]).all()
    assert (drawn.mean_XL[5] >= 1).all() and (drawn.mean_XL[5] <= 4).all()
    np.testing.assert_allclose(drawn.mean_XL[:4].sum(0), 1, rtol=1e-6)
