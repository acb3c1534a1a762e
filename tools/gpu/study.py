"""Section *study*: dense and two policies of the larger study `shapes`, shortened.

Scenes, an image tokenizer trained on them, codes, an arm per policy and data, each trained and judged by `megavlm` as a user would. It
needs scipy and scikit-learn. Tested by `tests/tools/test_gpu_check.py`.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megavlm.system.files import RECIPES, read_json
from megavlm.system.world import without_place
from tools.gpu.context import Context, Item, Outcome
from tools.gpu.record import ROOT

NEEDED = ("scipy", "sklearn")


def items(context: Context) -> dict[str, Item]:
    return {"data": partial(prepare, context), "arms": partial(run, context)}


def megavlm(context: Context, *arguments: str) -> None:
    """A command in a process of its own, its words in ``study-commands.log``."""
    with (context.out / "study-commands.log").open("a+") as log:
        environment = without_place(os.environ) | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        process = subprocess.run([sys.executable, "-m", "megavlm", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"megavlm {' '.join(arguments[:3])} ended with {process.returncode}: {log.read()[-4000:]}")


def prepare(context: Context) -> Outcome:
    """Scenes, tokenizer and codes; what is there already stays."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome({}, [f"not run: {', '.join(missing)} is missing; `bash tools/gpu_wheels.sh study` gathers it"])
    folder, sizes = context.folder / "shapes", context.sizes.study
    last = (sizes["train"] - 1) // 1000
    if not (folder / "text.model").exists():
        megavlm(context, "data", "shapes", str(folder), "--pixels=64", f"--num_train={sizes['train']}", f"--num_test={sizes['test']}")
    if not (folder / "vq" / "metrics.json").exists():
        images = f"{folder}/images-train-{{0000..{last:04d}}}.tar"
        shape = ("--pixels=64", "--height=16", "--width=16", f"--steps={sizes['vq_steps']}")
        megavlm(
            context, "data", "image-tokenizer", images, str(folder / "vq"), *shape, *([] if context.is_cuda else ["--codebook_size=16"])
        )
    parts = [("{understanding,generation}-train", last), ("{understanding,generation}-{seen,test}", (sizes["test"] - 1) // 1000)]
    for stem, end in parts:
        shards = f"{folder}/{stem}-{{0000..{end:04d}}}.tar"
        megavlm(context, "data", "encode", shards, str(folder / "codes"), f"--tokenizer={folder / 'vq'}")
    return Outcome({"tokenizer": read_json(folder / "vq" / "metrics.json")})


def shortened(context: Context) -> dict[str, Any]:
    """The study `shapes` with these policies, one seed, fewer steps, and data from the scratch folder."""
    study = yaml.safe_load((RECIPES / "studies" / "shapes.yaml").read_text())
    folder, sizes = context.folder / "shapes", context.sizes.study
    shards = -(-sizes["train"] // 1000)
    reads = max(1, shards // 10)
    study |= {"study_dir": str(context.folder / "study"), "seeds": [0]}
    study["policies"] = {name: study["policies"][name] for name in context.sizes.study_policies}
    first = f"{{0000..{reads - 1:04d}}}"
    others = f"{{{min(reads, shards - 1):04d}..{shards - 1:04d}}}"
    tests = f"{{0000..{(sizes['test'] - 1) // 1000:04d}}}"
    study["overrides"] |= {
        "vocabulary.text_model": f"{folder}/text.model",
        "vocabulary.image_tokenizer": {"kind": "vq", "path": f"{folder}/vq", "height": 16, "width": 16},
        "data.sources.understanding.shards": f"{folder}/codes/understanding-train-{first}.tar",
        "data.sources.generation.shards": f"{folder}/codes/generation-train-{others}.tar",
        "optimizer.num_steps": sizes["steps"],
        "optimizer.warmup_steps": max(1, sizes["steps"] // 20),
        "evaluation.shards": f"{folder}/codes/{{understanding,generation}}-{{seen,test}}-{tests}.tar",
        "evaluation.num_drawings": sizes["drawings"],
    }
    for task in study["tasks"].values():
        if "alone" in task:
            task["alone"] = {"evaluation.num_drawings": min(10, sizes["drawings"])}
    if not context.is_cuda:
        study["overrides"] |= {"data.pack_tokens": 1024, "data.look_ahead_samples": 32, "data.num_lanes": 2}
        study["overrides"] |= {f"model.architecture.{name}": 32 for name in ("hidden_size", "intermediate_size")}
        study["overrides"] |= {f"model.architecture.{name}": 2 for name in ("num_attention_heads", "num_key_value_heads")}
        study["overrides"] |= {"model.architecture.head_dim": 16, "model.architecture.num_hidden_layers": 4}
    return study


def run(context: Context) -> Outcome:
    """Train and judge every arm; those that end are kept, whatever becomes of the others."""
    if not (context.folder / "shapes" / "codes").exists():
        found = prepare(context)  # of a call before, whose folder is gone
        if found.failures:
            return found
    file = context.folder / "study.yaml"
    study = shortened(context)
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    failures = []
    try:
        megavlm(context, "study", str(file), f"--parallel={context.sizes.study['parallel']}")
    except RuntimeError as error:
        failures.append(str(error)[-1500:])
    arms = {folder.name: of_arm(folder) for folder in sorted((Path(study["study_dir"]) / "runs").glob("*"))}
    failures += [f"{name} was not judged" for name, arm in arms.items() if arm is None]
    failures += [
        f"{name}: a loss is not finite" for name, arm in arms.items() if arm and not all(map(math.isfinite, arm["losses"].values()))
    ]
    report = Path(study["study_dir"]) / "report.json"
    return Outcome({"arms": arms, "report": json.loads(report.read_text()) if report.exists() else None}, failures)


def of_arm(folder: Path) -> dict[str, Any] | None:
    """What an arm's evaluation says; None if it has none."""
    file = folder / "evaluation.json"
    if not file.exists():
        return None
    found = read_json(file)
    return {"losses": found["losses"], "understanding": found.get("understanding"), "generation": found.get("generation")}
