"""`tools/sweep_drawing.py` gives every run as many tries, chooses by some drawings and reports others, and goes on where it stopped."""

import json
from itertools import product

import pytest
import torch

from megavlm.benchmarks.digits import DigitsBenchmark
from megavlm.evaluation.trained import TrainedModel
from megavlm.parts.parts import Parts
from megavlm.runs.folder import RunFolder
from tools.sweep_drawing import METRICS, Setting, Subject, Sweep

SETTINGS = [Setting(*of) for of in product((1.0, 3.0), (0.8, 1.2), ("dense", "trained"))]


@pytest.fixture
def subject(make_config, tmp_path):
    def make(policy):
        parts = Parts(make_config({"routing.generation": policy}))
        torch.manual_seed(0)
        backbone = parts.make_backbone().eval()
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = RunFolder(tmp_path)
        model = TrainedModel(
            folder=folder,
            checkpoint=folder.checkpoints,
            backbone=backbone,
            encoder=parts.encoder,
            costing=parts.inference_costing,
            device=torch.device("cpu"),
            config=parts.config.evaluation,
            seed=0,
        )
        return Subject(model, parts, DigitsBenchmark([], 10, parts.image_tokenizer))

    return make


def counted(subject, calls):
    def judged(setting, stream, original=subject.judged):
        calls.append((setting, stream))
        return original(setting, stream)

    subject.judged = judged
    return subject


@pytest.mark.parametrize("policy", [{"policy": "random_ltd", "keep_ratio": 0.3}, {"policy": "patches"}, {"policy": "dense"}])
def test_a_run_is_judged_in_every_setting_and_its_best_ones_again(subject, tmp_path, policy):
    calls = []
    sweep = Sweep(tmp_path / "sweep", SETTINGS, METRICS)
    sweep.run("mine", counted(subject(policy), calls))
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["mine"]
    assert list(found["tries"]) == [setting.name for setting in SETTINGS]
    # without guidance there is no second half, and some runs have no route: the same drawings stand for both
    has_route = policy["policy"] == "random_ltd"
    assert sum(stream == 0 for _, stream in calls) == 4 + 2 * has_route
    for metric, better in METRICS.items():
        best = found["best"][metric]
        values = [result[metric] for result in found["tries"].values()]
        assert best["when_chosen"] == (max if better == "high" else min)(values) == found["tries"][best["setting"]][metric]
        assert best["value"] == found["again"][best["setting"]][metric]
    assert any(found["again"][name] != found["tries"][name] for name in found["again"])
    if has_route:
        assert found["tries"][SETTINGS[-2].name] != found["tries"][SETTINGS[-1].name]


def test_the_same_command_goes_on(subject, tmp_path):
    calls = []
    arm = counted(subject({"policy": "random_ltd", "keep_ratio": 0.3}), calls)
    Sweep(tmp_path, SETTINGS[:3], METRICS).run("mine", arm)
    before = len(calls)
    sweep = Sweep(tmp_path, SETTINGS[:3], METRICS)
    sweep.run("mine", arm)
    assert len(calls) == before
    lines = list(sweep.table())
    assert len(lines) == 3 and lines[2].startswith("| mine |")
    sweep.picture()
    assert (tmp_path / "sweep.png").is_file()
