"""Loader throughput on one core, pre-tokenised: the whole way from shards to packs in memory, beside a plain WebDataset pipeline.

    python tools/bench_loader.py --out docs/data/loader.json

Writes shards of samples of 1,024 tokens (an image of 31 x 32 codes and text), then reads them with a lane (parse, check, tokenize the text,
look-ahead of 256, equal-cost packing, route, pin if there is a GPU) for packs of 8,192 and of 32,768 tokens, in turns with three pipelines
of WebDataset, in one process on one core:

    decoded      ``WebDataset(…).shuffle(1000).decode()``: json and npy become objects; nothing is checked, no text is tokenized
    tokenized    the same, then every sample becomes one array of ids
    batched      the same with a mask of the losses and ``batched(8)``: padded tensors, ready for a step

None of them packs, routes, checks its input, or can resume.
"""

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from webdataset.compat import FluidInterface, WebDataset
from webdataset.writer import TarWriter

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.parts.parts import Parts

NUM_SHARDS, SAMPLES_PER_SHARD, SAMPLE_TOKENS = 8, 500, 1024
HEIGHT, WIDTH, CODEBOOK = 31, 32, 256
PACK_TOKENS = (8192, 32768)


def write(folder: Path) -> None:
    rng = np.random.default_rng(0)
    digits.write(folder)
    for task in ("understanding", "generation"):
        for shard in range(NUM_SHARDS // 2):
            with TarWriter(str(folder / f"bench-{task}-{shard}.tar"), encoder=False, mtime=0) as writer:
                for i in range(SAMPLES_PER_SHARD):
                    content = io.BytesIO()
                    np.save(content, rng.integers(CODEBOOK, size=(HEIGHT, WIDTH)).astype(np.int16))
                    # 28 text tokens: 992 + 28 + 4 = 1,024
                    image: dict[str, Any] = {"image": "img0"}
                    text: dict[str, Any] = {"text": "zero " * 28}
                    (image if task == "generation" else text)["loss"] = True
                    segments = [image, text] if task == "understanding" else [text, image]
                    record = {"task": task, "segments": segments}
                    writer.write({"__key__": f"{i:06d}", "json": json.dumps(record).encode(), "img0.npy": content.getvalue()})


def make_lane(folder: Path, run: int, pack_tokens: int):
    overrides = {
        "run_dir": "unused",
        "seed": run,
        "model.architecture": {
            "model_type": "qwen3",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
        },
        "vocabulary.text_model": str(folder / "text.model"),
        "vocabulary.image_tokenizer": {"kind": "pixel", "levels": CODEBOOK, "height": HEIGHT, "width": WIDTH},
        "data.sources": {t: {"shards": f"{folder}/bench-{t}-{{0..3}}.tar"} for t in ("understanding", "generation")},
        "data.num_lanes": 1,
        "data.pack_tokens": pack_tokens,
        "data.look_ahead_samples": 256,
        "data.mixture_samples": 64,
        "routing.understanding": {"policy": "late_drop", "after_layer": 8},
        "routing.generation": {"policy": "dense"},
    }
    return Parts(load_config("digits", overrides)).with_mixture().make_lane(0)


def time_lane(lane, num_samples: int) -> float:
    """Samples per second of processor time."""
    pin, samples = torch.cuda.is_available(), 0
    begin = time.process_time()
    while samples < num_samples:
        pack, _ = next(lane)
        pack = pack.pin_memory() if pin else pack
        samples += len(pack.keys)
    return samples / (time.process_time() - begin)


def time_webdataset(pipeline, num_samples: int) -> float:
    """Samples per second of processor time."""
    items = iter(pipeline)
    next(items)  # fills the shuffle buffer's beginning
    begin, found = time.process_time(), 0
    while found < num_samples:
        item = next(items)
        found += len(item[0]) if isinstance(item, list) else 1
    return found / (time.process_time() - begin)


def decoded(folder: Path) -> FluidInterface:
    urls = sorted(str(path) for path in folder.glob("bench-*.tar"))
    return WebDataset(urls, shardshuffle=False, repeat=True).shuffle(1000).decode()


def tokenizer_of(vocabulary):
    """The least that makes a decoded sample trainable: ids and what has a loss ``[1024]``."""

    def tokens(sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
        runs, lengths, losses = [[vocabulary.bos]], [1], [False]
        for segment in sample["json"]["segments"]:
            is_text = "text" in segment
            runs.append(vocabulary.encode_text(segment["text"]) if is_text else vocabulary.encode_image(sample[segment["image"] + ".npy"]))
            lengths.append(len(runs[-1]))
            losses.append(segment.get("loss", False))
        ids = np.concatenate([*runs, [vocabulary.eos]])
        return torch.from_numpy(ids), torch.from_numpy(np.repeat([*losses, losses[-1]], [*lengths, 1]))

    return tokens


def collate(samples: list) -> list[torch.Tensor]:
    """Padded batches, pinned if there is a GPU."""
    batch = [pad_sequence(list(column), batch_first=True) for column in zip(*samples)]
    return [tensor.pin_memory() for tensor in batch] if torch.cuda.is_available() else batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for run in range(options.rounds):
            for pack_tokens in PACK_TOKENS:
                lane = make_lane(folder, run, pack_tokens)
                next(lane)  # fills the look-ahead
                rounds.setdefault(f"lane, packs of {pack_tokens:,}", []).append(time_lane(lane, options.samples))
            tokens = tokenizer_of(lane.encoder.vocabulary)
            rivals = {
                "decoded": decoded(folder),
                "tokenized": decoded(folder).map(tokens),
                "batched": decoded(folder).map(tokens).batched(8, collation_fn=collate),
            }
            for rival, pipeline in rivals.items():
                rounds.setdefault(f"webdataset, {rival}", []).append(time_webdataset(pipeline, options.samples))
    rates = {name: float(np.median(values)) for name, values in rounds.items()}
    lanes, others = ([name for name in rates if name.startswith(kind)] for kind in ("lane", "webdataset"))
    result = {
        "sample_tokens": SAMPLE_TOKENS,
        "pinned": torch.cuda.is_available(),
        "samples_per_s": {name: round(rate) for name, rate in rates.items()},
        "tokens_per_s": {name: round(rates[name] * SAMPLE_TOKENS) for name in lanes},
        "ratio": {lane: {other: round(rates[lane] / rates[other], 2) for other in others} for lane in lanes},
        "rounds_samples_per_s": {name: [*map(round, values)] for name, values in rounds.items()},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
