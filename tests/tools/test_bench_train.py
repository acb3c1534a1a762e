"""The benchmark of the whole step: its peer computes what it should, its figures follow from its measurements, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import DataCollatorWithFlattening

from megavlm.model.backbone import make_causal_lm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_train  # noqa: E402 (tools are no package)
from bench_train_arms import pad  # noqa: E402

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("collate", [pad, DataCollatorWithFlattening()], ids=["padded", "flattened"])
def test_batches_of_the_peer_are_exact_with_sdpa(collate):
    """The sum of cross-entropy of a batch is that of its samples alone."""
    torch.manual_seed(0)
    model = make_causal_lm(ARCHITECTURE, 50).double()
    ids = [torch.randint(50, (length,)).tolist() for length in (5, 17, 9)]
    items = [{"input_ids": x, "labels": [-100, -100, *x[2:]]} for x in ids]
    alone = 0.0
    for item in items:
        logits = model(input_ids=torch.tensor([item["input_ids"]]), use_cache=False).logits[0, :-1]
        alone += float(functional.cross_entropy(logits, torch.tensor(item["labels"][1:]), ignore_index=-100, reduction="sum"))
    batch = dict(collate(items))
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    together = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert model.config._attn_implementation == "sdpa"
    assert float(together) == pytest.approx(alone, rel=1e-9)


def measured(seconds: list[float], losses: list[float], flops_left: float = 1.0, positions: float = 100) -> dict:
    turn = {"steps": 1, "tokens": 100, "positions": positions, "samples": 5, "dense_flops": 1e9, "executed_flops": flops_left * 1e9}
    turns = [turn | {"seconds": s, "loss": loss, "peak_bytes": 2**30} for s, loss in zip(seconds, losses)]
    return {"session": 1.0, "ceiling_flops_per_s": 1e10, "first_loss": 6.0, "turns": turns}


def test_figures_follow_from_what_was_measured():
    arms = {
        "dense": measured([9.0, 1.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0]),
        "route": measured([9.0, 0.6, 1.2, 0.6], [5.0, 4.0, 3.0, 2.5], flops_left=0.5),
        "padded": measured([9.0, 2.0, 4.0, 2.0], [5.0, 4.0, 3.5, 3.0], positions=250),
    }
    rows = bench_train.summarize(arms)
    assert rows["dense"]["tokens_per_s"] == 100 and rows["dense"]["over_padded"] == 2
    assert rows["dense"]["dense_over_this"] == 1 and rows["padded"]["dense_over_this"] == 2
    assert rows["padded"]["padding"] == pytest.approx(0.6)
    assert rows["dense"]["mfu_dense_equivalent"] == pytest.approx(0.3)
    assert rows["route"]["time_left"] == pytest.approx(0.6)
    assert rows["route"]["realised_saving"] == pytest.approx(0.8)
    # 3.0 is the lowest that all reached: at the end of the third turn, and of the fourth
    assert [rows[name]["seconds_to_loss"] for name in arms] == pytest.approx([12.0, 10.8, 17.0])
    shown = bench_train.table("15M", "mixed", arms)
    assert "50.0% of the FLOPs" in shown and "0.80 of the theoretical saving" in shown and "earlier session" not in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_run_measures_all_arms_and_is_not_repeated(tmp_path):
    command = [sys.executable, "tools/bench_train.py", "--sizes=tiny", "--regimes=mixed", "--minutes=0.1"]
    command += [f"--out={tmp_path}/out", f"--figure={tmp_path}/figure.png", f"--folder={tmp_path}/runs"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    arms = json.loads((tmp_path / "out.json").read_text())["sizes"]["tiny"]["mixed"]
    assert list(arms) == list(bench_train.NAMES)
    assert (tmp_path / "figure.png").stat().st_size > 0
    for name, arm in arms.items():
        assert len(arm["turns"]) >= bench_train.LEAST_ROUNDS
        assert arm["turns"][-1]["loss"] < arm["first_loss"]
        # transformers' own sampler begins with the longest samples
        assert 0.4 < sum(turn["tokens"] for turn in arm["turns"]) / sum(turn["tokens"] for turn in arms["dense"]["turns"]) < 3, name
        assert (arm["turns"][-1]["positions"] > arm["turns"][-1]["tokens"]) == (name in ("padded", "grouped"))
    assert 0.6 < bench_train.summarize(arms)["route"]["flops_left"] < 0.9  # a third of the layers has the route
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "round" not in again.stdout.splitlines()[0] and again.stdout.strip() in first.stdout
