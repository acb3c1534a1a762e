"""The table of docs/models.md: every text decoder of transformers, in and out again, or the words that it is refused with.

python tools/families.py docs/results/families.json > table.md      with names behind it, only these are measured again

in        the largest difference between logits of packed samples and of `transformers`, in float64 (megavlm.model.proof)
trained   the loss of drawing in the third of three steps, ZeRO-3 on two ranks of a CPU, on the digits of the quickstart
out       the largest difference between logits of the export in `transformers` and of the run's own weights, in float32

Tested by `tests/tools/test_families.py`.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.multiprocessing.spawn import spawn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.launch.train import make_trainer
from megavlm.model.families import read_exact
from megavlm.model.proof import VOCABULARY, prove
from megavlm.parts.export import export
from megavlm.parts.trained import load_trained
from megavlm.system import world as distributed

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
HEAD_WIDTH_NEEDED = ("helium", "ministral")
"""Families that transformers cannot run without ``head_dim``."""
NUM_STEPS, NUM_RANKS = 3, 2


def architecture_of(model_type: str) -> dict[str, Any]:
    kind = CONFIG_MAPPING[model_type]
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    architecture: dict[str, Any] = {"model_type": model_type} | {name: value for name, value in SIZES.items() if name in known}
    if model_type in HEAD_WIDTH_NEEDED:
        architecture["head_dim"] = 16
    text = kind.sub_configs_defaults.get("text_config")
    if text is not None and text.model_type in CONFIG_MAPPING:
        architecture["text_config"] = architecture_of(text.model_type)
    return architecture


def verdict(model_type: str) -> float | str:
    """The largest difference of two logits, or the words of the refusal."""
    architecture = architecture_of(model_type)
    try:
        read_exact(architecture, VOCABULARY)
        return prove(architecture)
    except ValueError as error:
        # the list of families that are exact ends many messages
        return str(error).split("; ")[0].split(", which is not computed")[0][:120].replace("|", "/")


def train_and_export(rank: int, port: int, folder: Path, families: list[str]) -> None:
    """One rank of all runs, one after the other; rank 0 leaves what it measured in ``folder``."""
    place = {"RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    world, measured = distributed.start(timeout_s=120), {}
    for family in families:
        trainer = make_trainer(load_config("digits", recipe(folder, family)), world)
        for step in range(NUM_STEPS):
            trainer.train_step(step)
            trainer.step = step + 1
            report = trainer.meters.report()
        trainer.save()
        trainer.checkpointer.close()
        if world.rank == 0:
            measured[family] = {"loss": report["loss/generation"], "out": difference_after_export(folder / family)}
    if world.rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))


def recipe(folder: Path, family: str) -> dict:
    shards = {task: {"shards": f"{folder}/data/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")}
    return {
        "run_dir": str(folder / family),
        "model.architecture": architecture_of(family),
        "vocabulary.text_model": f"{folder}/data/text.model",
        "data.sources": shards,
        "evaluation.shards": [f"{folder}/data/{task}-test-00.tar" for task in shards],
        "data.pack_tokens": 340,
        "data.look_ahead_samples": 12,
        "data.num_lanes": 4,
        "optimizer.num_steps": NUM_STEPS,
        "optimizer.warmup_steps": 1,
        "monitor.sample_every_steps": None,
        "monitor.log_every_steps": 1,
        "checkpoint.every_steps": NUM_STEPS,
    }


@torch.no_grad()
def difference_after_export(run: Path) -> float:
    out = run.with_name(f"{run.name}-out")
    export(run, out)
    ours = load_trained(run)[0].backbone.causal_lm
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(1, 200, 3)[None]
    ours.config._attn_implementation = theirs.config._attn_implementation = "eager"  # the others know no soft caps
    return float((ours(ids).logits - theirs(ids).logits).abs().max())


def table(results: dict[str, dict]) -> str:
    lines = ["| family | in | trained | out |", "|---|---|---|---|"]
    for family, found in sorted(results.items()):
        if "refused" in found:
            lines.append(f"| {family} | refused: {found['refused']} | | |")
        else:
            trained, out = (f"{found['loss']:.2f}", f"{found['out']:.0e}") if "loss" in found else ("", "")
            lines.append(f"| {family} | {found['in']:.0e} | {trained} | {out} |")
    return "\n".join(lines)


def measure(families: list[str]) -> dict[str, dict]:
    """What `train_and_export` found."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as sock:
        digits.write(Path(name) / "data")
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.close()
        spawn(train_and_export, (port, Path(name), families), nprocs=NUM_RANKS)
        return json.loads((Path(name) / "measured.json").read_text())


def main(out: Path, families: list[str]) -> None:
    verdicts = {family: verdict(family) for family in families}
    exact = [family for family, found in verdicts.items() if not isinstance(found, str)]
    measured = measure(exact) if exact else {}
    results = json.loads(out.read_text())["families"] if out.is_file() else {}
    for family, found in verdicts.items():
        results[family] = {"in": found, **measured[family]} if family in measured else {"refused": found}
    out.write_text(json.dumps({"transformers": transformers.__version__, "families": results}, indent=1, sort_keys=True) + "\n")
    print(table(results))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]), sys.argv[2:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
