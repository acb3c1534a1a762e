#!/usr/bin/env python
"""What compressed image tokens cost and save: runs side by side that differ only in the image tokenizer.

    python tools/bench_compress.py runs/compress/{dense,4x,16x} --raw data/compress/generation-seen-0000.tar --out docs/results/compress

The runs must be trained and evaluated (`tools/compress.sh` does both); the others are compared with the first. The script measures, in one
process, all runs in turn: FLOPs of a training step by formula, and its time (forward and backward pass, without the optimizer); seconds to
draw an image, codes and pixels apart; quality of restored raw images. It copies the run's evaluation.json and the plug-in's metrics.json.
Writes OUT.json and OUT.png.
"""

import json
import statistics
import textwrap
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import fire
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.costs import BACKWARD_FACTOR
from megavlm.data.read.sample import Coordinates, Sample, parse_sample
from megavlm.data.read.shards import expand_shards, read_shard
from megavlm.evaluation.trained import TrainedModel
from megavlm.image_tokenizers.compressed import CompressedTokenizer
from megavlm.image_tokenizers.vq_training import reconstruction_metrics
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_trained

NUM_PACKS, NUM_RAW, NUM_SHOWN = 10, 400, 8


def bench(*runs: str, raw: str, out: str, batch_images: int = 16, repeats: int = 3):
    """Compare runs.

    Args:
        runs: Run folders, evaluated; the one with dense codes first.
        raw: Shards of held-out raw images.
        out: Files to write, without extension.
        batch_images: Images drawn at a time, beside one alone.
        repeats: Timed rounds; the median counts.
    """
    trained = {Path(run).name: load_trained(run) for run in runs}
    models = {name: model for name, (model, _) in trained.items()}
    configs = {name: parts.config for name, (_, parts) in trained.items()}
    packs = {name: [pack.to(parts.device) for pack in _packs(parts)] for name, (_, parts) in trained.items()}
    images_NHWC = np.stack([image for sample in _samples("--raw", raw)[:NUM_RAW] for image in sample.images.values()])
    restored = {name: model.image_tokenizer.decode(model.image_tokenizer.encode(images_NHWC)) for name, model in models.items()}
    samples = _samples("evaluation", next(iter(models.values())).config.shards)
    prompts = ["".join(s.text for s in sample.segments if s.text) for sample in samples if sample.task == "generation"]
    seconds = _in_turn(
        {
            (name, what): way
            for name, model in models.items()
            for what, way in {
                "step": partial(_train, model, packs[name]),
                "codes": partial(model.draw, prompts[:batch_images]),
                "codes_one": partial(model.draw, prompts[:1]),
                "pixels": partial(model.image_tokenizer.decode, model.draw(prompts[:batch_images])),
            }.items()
        },
        repeats,
    )
    rows = {}
    for name, model in models.items():
        num_samples = sum(len(pack.keys) for pack in packs[name])
        flops = (1 + BACKWARD_FACTOR) * sum(float(pack.flops.sum()) for pack in packs[name])
        evaluation = json.loads(model.folder.evaluation.read_text())
        rows[name] = {
            "tokens_per_image": model.image_tokenizer.height * model.image_tokenizer.width,
            "steps": configs[name].optimizer.num_steps,
            "samples_per_step": num_samples / NUM_PACKS * configs[name].data.num_lanes,
            "gflops_per_step": flops / NUM_PACKS * configs[name].data.num_lanes / 1e9,
            "gflops_per_sample": flops / num_samples / 1e9,
            "seconds_per_sample": seconds[name, "step"] / num_samples,
            "psnr_db": reconstruction_metrics(images_NHWC, restored[name])["psnr_db"],
            "scenes_intact": {split: part["ceiling"]["accuracy_by_judge"] for split, part in _splits(evaluation, "generation")},
            "plug_in": _plug_in(model.image_tokenizer),
            "losses": evaluation["losses"],
            "questions_right": {split: part["accuracy_by_scoring"] for split, part in _splits(evaluation, "understanding")},
            "questions_right_by_kind": {
                kind: part["accuracy_by_scoring"]
                for kind, part in evaluation["understanding"]["by_split"]["seen"].items()
                if isinstance(part, dict)
            },
            "drawings_right": {split: part["accuracy_by_judge"] for split, part in _splits(evaluation, "generation")},
            "drawings_with_right_shapes": {split: part["shapes"] for split, part in _splits(evaluation, "generation")},
            "frechet_distance": {split: part["frechet_distance"] for split, part in _splits(evaluation, "generation")},
            "drawing_s_per_image": {
                "codes": seconds[name, "codes"] / batch_images,
                "pixels": seconds[name, "pixels"] / batch_images,
                "codes_of_one_image_alone": seconds[name, "codes_one"],
            },
        }
    result = {
        "command": f"python tools/bench_compress.py {' '.join(runs)} --raw {raw} --out {out}",
        "questions": evaluation["understanding"]["questions"],
        "drawings": evaluation["generation"]["drawings"],
        "questions_right_by_the_commonest_answer_of_each_kind": _commonest(samples),
        "images_drawn_at_a_time": batch_images,
        "machine": f"CPU, threads: {torch.get_num_threads()}" if model.device.type == "cpu" else torch.cuda.get_device_name(),
        "rows": rows,
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1))
    _show(result)
    drawn = {name: model.image_tokenizer.decode(model.draw(prompts[:NUM_SHOWN])) for name, model in models.items()}
    _plot(result, images_NHWC, restored, prompts, drawn, path.with_suffix(".png"))


def _samples(option: str, shards) -> list[Sample]:
    return [
        parse_sample(key, members, Coordinates(0, 0, shard, index))
        for shard, url in enumerate(expand_shards(option, shards))
        for index, (key, members) in enumerate(read_shard(url))
    ]


def _packs(parts: Parts) -> list:
    """The first packs of the run's first lane."""
    return [pack for pack, _ in islice(parts.make_lane(0), NUM_PACKS)]


def _train(model: TrainedModel, packs: list) -> None:
    for pack in packs:
        model.backbone(pack).sum().backward()


def _in_turn(ways: dict, repeats: int) -> dict:
    """Median seconds of each way, all of them in turn; the first round warms up."""
    seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _splits(evaluation: dict, task: str) -> list[tuple[str, dict]]:
    return [*evaluation[task]["by_split"].items()]


def _plug_in(tokenizer) -> dict | None:
    """What the plug-in achieved on held-out images, and its forward FLOPs per image; None for a tokenizer without one."""
    if not isinstance(tokenizer, CompressedTokenizer):
        return None
    dense_Nhw = torch.zeros(1, tokenizer.around.height, tokenizer.around.width, dtype=torch.long, device=tokenizer.device)
    # the fused attention of CPUs is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as compressing:
        indices_NP = tokenizer.plug_in.compress(dense_Nhw)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as restoring:
        tokenizer.plug_in.restore(indices_NP)
    flops = {"compress": compressing.get_total_flops() / 1e9, "restore": restoring.get_total_flops() / 1e9}
    return json.loads((tokenizer.path / "metrics.json").read_text())["held_out"] | {"gflops_per_image": flops}


def _commonest(samples: list[Sample]) -> float:
    """Share of the questions that are right if each kind always gets its commonest answer."""
    kinds: dict[str, Counter] = {}
    for sample in samples:
        if sample.task == "understanding":
            kinds.setdefault(sample.meta["kind"], Counter())[sample.meta["answer"]] += 1
    return sum(max(counts.values()) for counts in kinds.values()) / sum(counts.total() for counts in kinds.values())


def _panels(result: dict) -> dict[str, dict[str, float]]:
    """What is drawn and shown: title → run → number."""
    rows = result["rows"]
    return {
        "tokens per image": {name: row["tokens_per_image"] for name, row in rows.items()},
        "training GFLOPs per sample": {name: row["gflops_per_sample"] for name, row in rows.items()},
        "training ms per sample": {name: 1e3 * row["seconds_per_sample"] for name, row in rows.items()},
        "drawing ms per image": {
            name: 1e3 * (row["drawing_s_per_image"]["codes"] + row["drawing_s_per_image"]["pixels"]) for name, row in rows.items()
        },
        "reconstruction PSNR, dB": {name: row["psnr_db"] for name, row in rows.items()},
        "scenes intact after reconstruction, %": {name: 100 * row["scenes_intact"]["seen"] for name, row in rows.items()},
        "questions right, %": {name: 100 * row["questions_right"]["seen"] for name, row in rows.items()},
        "drawings right, %": {name: 100 * row["drawings_right"]["seen"] for name, row in rows.items()},
    }


def _show(result: dict) -> None:
    table = Table("", *result["rows"])
    for title, values in _panels(result).items():
        table.add_row(title, *(f"{value:.3g}" for value in values.values()))
    Console(width=130).print(table, result["command"], result["machine"])


def _plot(result: dict, images_NHWC: np.ndarray, restored: dict, prompts: list[str], drawn: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(14, 13), layout="constrained")
    bars, pictures, requests = figure.subfigures(3, 1, squeeze=False, height_ratios=[4.2, 1 + len(restored), 0.9 + len(drawn)]).flat
    for axis, (title, values) in zip(bars.subplots(2, 4).flat, _panels(result).items()):
        axis.bar_label(axis.bar(list(values), list(values.values()), color=["0.6", "tab:blue", "tab:orange"]), fmt="%.3g", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.margins(y=0.15)
        if title.startswith("questions"):
            axis.axhline(100 * result["questions_right_by_the_commonest_answer_of_each_kind"], color="k", ls=":", lw=1)
    rows = {"image": images_NHWC} | {f"{name}, restored": images for name, images in restored.items()}
    _grid(pictures, rows, [""] * NUM_SHOWN)
    _grid(requests, {f"{name}, drawn": images for name, images in drawn.items()}, [textwrap.fill(p, 26) for p in prompts[:NUM_SHOWN]])
    figure.savefig(path, dpi=90)


def _grid(figure, rows: dict[str, np.ndarray], captions: list[str]) -> None:
    axes = figure.subplots(len(rows), NUM_SHOWN, squeeze=False)
    for line, (title, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, fontsize=8)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(caption, fontsize=6.5)


if __name__ == "__main__":
    fire.Fire(bench)
