"""The commands on a run, as a user types them."""

import json

import numpy as np
import pytest
import yaml

from tests.cli.test_main import megavlm


def finite(value):
    if isinstance(value, dict):
        return [x for item in value.values() for x in finite(item)]
    if isinstance(value, list):
        return [x for item in value for x in finite(item)]
    return [value] if isinstance(value, float) else []


def test_attention(trained, held_out, monkeypatch, capsys):
    megavlm(monkeypatch, "analyze", "attention", trained, f"--shards={held_out}", "--num_packs=2", "--evaluation.route=trained")
    assert "understanding: text" in capsys.readouterr().out
    found = json.loads((trained / "analysis" / "attention.json").read_text())
    assert found["checkpoint"] == "step-00000004" and found["samples_from"] == "held-out shards" and found["route"] == "trained"
    drawn = found["attention"]["generation/image"]
    assert np.array(drawn["image"]["heads"]).shape == (4, 2)
    np.testing.assert_allclose(sum(np.array(drawn[k]["mean"]) for k in ("text", "image", "special", "sink")), 1, atol=1e-5)
    assert found["attention"]["generation/text"]["effective_image_tokens"]["mean"] == [None] * 4
    for name in ("attention.png", "attention_heads.png"):
        assert (trained / "analysis" / name).stat().st_size > 5000


def test_drops_with_a_route(trained, held_out, monkeypatch, capsys):
    megavlm(monkeypatch, "analyze", "drops", trained, f"--shards={held_out}", "--num_packs=2", "--flops_share=0.7", "--keep_ratios=[0.25]")
    out = capsys.readouterr().out
    route = yaml.safe_load((trained / "analysis" / "route.yaml").read_text())
    assert set(route) == {"routing"} and yaml.safe_load(out[out.index("routing:") :]) == route
    found = json.loads((trained / "analysis" / "drops.json").read_text())
    assert len(found["candidates"]) == 3 + 2 + 2 * 2 and all(np.isfinite(finite(found)))
    assert (trained / "analysis" / "drops.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "analyze", "drops", trained, "--num_packs=1", "--flops_share=0.01", "--keep_ratios=0.25")
    assert "the least is" in capsys.readouterr().err
    left = json.loads((trained / "analysis" / "drops.json").read_text())
    assert left["samples_from"] == "training sources" and len(left["candidates"]) == 3 + 2 + 2 * 2, "what was measured is not thrown away"


def test_geometry_over_all_checkpoints(trained, monkeypatch, capsys):
    megavlm(monkeypatch, "analyze", "geometry", trained, "--num_packs=2", "--num_images=8")
    assert "CKA" in capsys.readouterr().out
    found = json.loads((trained / "analysis" / "geometry.json").read_text())["checkpoints"]
    assert [entry["step"] for entry in found] == [2, 4] and found[0]["cka"] != found[1]["cka"]
    assert found[0]["cka"][0] == pytest.approx(1, abs=1e-6) and len(found[0]["cka"]) == 5
    blocks = found[1]["gradients"]["understanding_generation"]
    assert len(blocks) == 4 * 6 + 4 and -1 < blocks["all"]["cosine"] < 1
    for name in ("gradients_understanding_generation.png", "similarity.png"):
        assert (trained / "analysis" / name).stat().st_size > 5000


def test_pictures_are_in_tensorboard(trained, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    megavlm(monkeypatch, "analyze", "attention", trained, "--num_packs=1")
    events = EventAccumulator(str(trained / "tensorboard" / "analysis")).Reload()
    assert {"analysis/attention", "analysis/attention_heads"} <= set(events.Tags()["images"])


@pytest.mark.parametrize(
    "arguments",
    [["attention", "--shards=/nowhere.tar"], ["geometry", "--num_packs=0"], ["drops", "--flops_share=0.5", "--keep_ratios=0.5,2"]],
)
def test_mistakes_are_named(trained, monkeypatch, capsys, arguments):
    command, *options = arguments
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "analyze", command, trained, *options)
    assert "do:" in capsys.readouterr().err
