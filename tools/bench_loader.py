"""Loader throughput on one core, pre-tokenised: the whole way from shards to packs in memory, beside a plain WebDataset pipeline.

    python tools/bench_loader.py --out docs/data/loader.json

Writes shards of samples of 1,024 tokens (an image of 31 x 32 codes and text), then reads them with a lane (parse, tokenize the text, look-ahead
of 256, equal-cost packing, route, pin if there is a GPU), in turns with two pipelines of WebDataset, in one process on one core:

    decoded      ``WebDataset(…).shuffle(1000).decode()``: json and npy become objects; nothing is checked, no text is tokenized
    tokenized    the same, then every sample becomes one array of ids: what any training does with it

Neither packs, routes, checks what it reads, or can resume.
"""

import argparse
import io
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import webdataset

from megavlm import build
from megavlm.benchmarks import digits
from megavlm.config import load_config

NUM_SHARDS, SAMPLES_PER_SHARD, SAMPLE_TOKENS = 8, 500, 1024
HEIGHT, WIDTH, CODEBOOK = 31, 32, 256


def write(folder: Path) -> None:
    rng = np.random.default_rng(0)
    digits.write(folder)
    for task in ("understanding", "generation"):
        for shard in range(NUM_SHARDS // 2):
            with webdataset.TarWriter(str(folder / f"bench-{task}-{shard}.tar"), encoder=False, mtime=0) as writer:
                for i in range(SAMPLES_PER_SHARD):
                    content = io.BytesIO()
                    np.save(content, rng.integers(CODEBOOK, size=(HEIGHT, WIDTH)).astype(np.int16))
                    # 28 text tokens: 992 + 28 + 4 = 1,024
                    image, text = {"image": "img0"}, {"text": "zero " * 28}
                    (image if task == "generation" else text)["loss"] = True
                    segments = [image, text] if task == "understanding" else [text, image]
                    record = {"task": task, "segments": segments}
                    writer.write({"__key__": f"{i:06d}", "json": json.dumps(record).encode(), "img0.npy": content.getvalue()})


def make_lane(folder: Path, run: int):
    overrides = {
        "run_dir": "unused",
        "seed": run,
        "model.architecture": {
            "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        },
        "vocabulary.text_model": str(folder / "text.model"),
        "vocabulary.image_tokenizer": {"kind": "pixel", "levels": CODEBOOK, "height": HEIGHT, "width": WIDTH},
        "data.sources": {t: {"shards": f"{folder}/bench-{t}-{{0..3}}.tar"} for t in ("understanding", "generation")},
        "data.num_lanes": 1,
        "data.pack_tokens": 8192,
        "data.look_ahead_samples": 256,
        "data.mixture_samples": 64,
        "routing.understanding": {"policy": "late_drop", "after_layer": 8},
        "routing.generation": {"policy": "dense"},
    }
    return build.LaneFactory(build.with_mixture(load_config("digits", overrides)))(0)


def time_lane(lane, num_samples: int) -> tuple[float, float]:
    """Samples and tokens per second of processor time."""
    pin = torch.cuda.is_available()
    samples = tokens = 0
    begin = time.process_time()
    while samples < num_samples:
        pack, _ = next(lane)
        pack = pack.pin_memory() if pin else pack
        samples, tokens = samples + len(pack.keys), tokens + pack.num_tokens
    elapsed_s = time.process_time() - begin
    return samples / elapsed_s, tokens / elapsed_s


def time_webdataset(folder: Path, num_samples: int, tokenize=None) -> float:
    """Samples per second of processor time."""
    urls = sorted(str(path) for path in folder.glob("bench-*.tar"))
    pipeline = webdataset.WebDataset(urls, shardshuffle=False, repeat=True).shuffle(1000).decode()
    samples = iter(pipeline.map(tokenize) if tokenize else pipeline)
    next(samples)  # fills the shuffle buffer's beginning
    begin = time.process_time()
    for _ in itertools.islice(samples, num_samples):
        pass
    return num_samples / (time.process_time() - begin)


def tokenizer_of(vocabulary):
    """The least that makes tokens of a decoded sample: ids ``[1024]``."""

    def tokens(sample: dict) -> np.ndarray:
        parts = [[vocabulary.bos]]
        for segment in sample["json"]["segments"]:
            if "text" in segment:
                parts.append(vocabulary.encode_text(segment["text"]))
            else:
                parts += [[vocabulary.boi], vocabulary.encode_codes(sample[segment["image"] + ".npy"]), [vocabulary.eoi]]
        return np.concatenate([*parts, [vocabulary.eos]])

    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        ours, decoded, tokenized = [], [], []
        for run in range(options.rounds):
            lane = make_lane(folder, run)
            next(lane)  # fills the look-ahead
            ours.append(time_lane(lane, options.samples))
            decoded.append(time_webdataset(folder, options.samples))
            tokenized.append(time_webdataset(folder, options.samples, tokenizer_of(lane.encoder.vocabulary)))
    samples_per_s, tokens_per_s = np.median(ours, axis=0)
    result = {
        "sample_tokens": SAMPLE_TOKENS,
        "pinned": torch.cuda.is_available(),
        "lane": {"samples_per_s": round(samples_per_s), "tokens_per_s": round(tokens_per_s)},
        "webdataset_decoded": {"samples_per_s": round(float(np.median(decoded)))},
        "webdataset_tokenized": {"samples_per_s": round(float(np.median(tokenized)))},
        "lane_over_tokenized": round(float(samples_per_s / np.median(tokenized)), 2),
        "rounds_samples_per_s": {
            "lane": [round(s) for s, _ in ours], "decoded": [*map(round, decoded)], "tokenized": [*map(round, tokenized)],
        },
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
