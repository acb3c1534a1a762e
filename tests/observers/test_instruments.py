"""The instruments under ZeRO-3: they change nothing, and say what a single process says."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavlm.analysis.attention import AttentionWatch
from megavlm.analysis.gradients import alone, factors_of_tasks
from megavlm.costs import ModelShape
from megavlm.parts.parts import Parts
from megavlm.routing.tasks import TASKS
from tests.analysis.work import train_on_each
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import DRAW_ONLY, NO_LOSS, READ_ONLY, SINGLE_TOKEN, TEXT_ONLY, _pack
from tests.routing.layouts import POLICIES

ON = {"monitor.attention_every_steps": 1, "monitor.geometry_every_steps": 2}


def scalars(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_training_is_bit_identical_with_instruments_on(make_config, tmp_path):
    """Under 2 ranks, with packs that lack images, labels or one of the tasks on some of them."""
    kinds, jobs = [TEXT_ONLY, READ_ONLY, DRAW_ONLY, SINGLE_TOKEN, NO_LOSS, READ_ONLY + DRAW_ONLY, TEXT_ONLY, NO_LOSS], {}
    for policy in ("random_ltd", "late_drop_and_gates"):
        understanding, generation = POLICIES[policy]
        routing = {"routing.understanding": understanding.model_dump(), "routing.generation": generation.model_dump()}
        steps = [[_pack(kinds[(lane + 2 * step) % len(kinds)], policy, lane, step) for lane in range(4)] for step in range(3)]
        for name, more in (("plain", {}), ("watched", ON)):
            jobs[policy, name] = make_config(routing | {"optimizer.warmup_steps": 0} | more, tmp_path / policy / name), steps
    for result in run_ranks(2, train_on_each, jobs):
        for policy in ("random_ltd", "late_drop_and_gates"):
            plain, watched = result[policy, "plain"], result[policy, "watched"]
            assert plain["norms"] == watched["norms"]
            different = [name for name, value in plain["weights"].items() if not value.equal(watched["weights"][name])]
            assert not different, different
            assert watched["left"] == [(0.0, 0)] * 3
    tags = scalars(tmp_path / "random_ltd" / "watched")
    assert sorted(tags["geometry_understanding_generation/cosine/all"]) == [2]
    assert any(tag.startswith("attention_generation_text/image/") for tag in tags)
    assert not any(tag.startswith(("attention", "geometry")) for tag in scalars(tmp_path / "random_ltd" / "plain"))


def test_two_ranks_say_what_one_process_says(make_config, tmp_path):
    """Gradients and attention of the first step, against plain autograd on all of its packs."""
    config = (
        Parts(make_config({"monitor.attention_every_steps": 1, "monitor.geometry_every_steps": 1}, tmp_path / "run")).with_mixture().config
    )
    make_lane = Parts(config).make_lane
    packs = [next(make_lane(lane))[0] for lane in range(4)]
    run_ranks(2, train_on_each, {"run": (config, [packs])})
    torch.manual_seed(config.seed)
    vocabulary = Parts(config).vocabulary
    backbone = Parts(config).make_backbone()
    labels_t = sum(pack.task_labels for pack in packs)
    weights_t = np.array([config.loss.task_weights.get(task, 1.0) for task in TASKS]) / np.maximum(labels_t, 1)
    factors = factors_of_tasks(torch.tensor(np.append(np.tile(weights_t, 2), 0.0), dtype=torch.float32), labels_t)
    found = scalars(tmp_path / "run")
    for block, a in alone(backbone, packs, factors)["understanding_generation"].items():
        group = "geometry_understanding_generation"
        assert found[f"{group}/cosine/{block}"][1] == pytest.approx(a.cosine, abs=2e-4), block
        assert found[f"{group}/norm_of_understanding/{block}"][1] == pytest.approx(a.norms[0], rel=1e-3)
        assert found[f"{group}/norm_of_generation/{block}"][1] == pytest.approx(a.norms[1], rel=1e-3)
        assert found[f"{group}/interference/{block}"][1] == pytest.approx(a.interference, rel=1e-2, abs=1e-5)
    watch = AttentionWatch(ModelShape.of(backbone.causal_lm.config), vocabulary, config.seed)
    for pack in packs[:2]:  # the first one of either rank
        with watch.on(backbone, pack):
            backbone(pack)
    for (task, query), allocation in watch.shares().items():
        for layer in range(4):
            got = found[f"attention_{task}_{query}/image/layer_{layer:02d}"][1]
            assert got == pytest.approx(allocation.mean_XL[1, layer], abs=1e-5)
