"""What the arms of `tools/bench_train.py` have in common: the samples, the model and the recipe.

Letters: L tokens of a sample. Tested by `tests/tools/test_bench_train.py`.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from megavlm.benchmarks import digits
from megavlm.config import RunConfig
from megavlm.data.pack.encode import EncodedSample
from megavlm.data.read.sample import Coordinates, parse_sample
from megavlm.data.read.shards import expand_shards, read_shard
from megavlm.parts.parts import Parts
from megavlm.vocabulary import train_text_model

NAMES = {
    "dense": "megavlm, dense",
    "route": "megavlm, shared_bypass",
    "padded": "transformers.Trainer, padded",
    "grouped": "transformers.Trainer, grouped by length",
    "flattened": "transformers.Trainer, DataCollatorWithFlattening",
}
REGIMES = {"mixed": "lengths differ: 1 to 8 images per sample, few samples have many", "uniform": "every sample has 3 images"}
TRAIN_SAMPLES, HELD_OUT_SAMPLES, SHARDS = 2000, 12, 8
LEARNING_RATE = 1e-3
FOREVER_S = 10**6


@dataclass(frozen=True)
class Job:
    """What the ranks of one arm need to know."""

    arm: str
    folder: str
    """Of the regime: shards, text model, and a folder for each arm."""
    width: int
    num_layers: int
    pack_tokens: int
    packs_per_rank: int
    ranks: int
    steps_per_turn: int
    keep_ratio: float
    threads: int
    deepspeed: str

    @property
    def log(self) -> Path:
        return Path(self.folder) / f"{self.arm}.log"


def write_samples(folder: Path, regime: str) -> None:
    """Shards of documents that ask for handwritten digits and draw them, and the text model; the same at every call.

    Every image is drawn, so there is one task, and the mean over labelled tokens is the loss of all arms alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, texts, written = np.random.default_rng(0), [], {}
    for split, count in (("train", TRAIN_SAMPLES), ("test", HELD_OUT_SAMPLES)):
        codes, shards = digits.load(split), SHARDS if split == "train" else 1
        for shard, keys in enumerate(np.array_split(np.arange(count), shards)):
            written[split, shard] = TarWriter(str(folder / f"{split}-{shard:02d}.tar"), encoder=False, mtime=0)
            for key in keys:
                num_images = 3 if regime == "uniform" else min(rng.geometric(0.35), 8)
                members, segments = {}, []
                for number, i in enumerate(rng.integers(len(codes.labels), size=num_images)):
                    request = str(rng.choice(digits.REQUESTS)).format(digits.WORDS[codes.labels[i]])
                    texts.append(request)
                    segments += [{"text": request}, {"image": f"img{number}", "loss": True}]
                    np.save(array := io.BytesIO(), codes.codes[i])
                    members[f"img{number}.npy"] = array.getvalue()
                document = json.dumps({"task": "generation", "segments": segments}).encode()
                written[split, shard].write({"__key__": f"{split}-{key:05d}", "json": document} | members)
            written[split, shard].close()
    train_text_model(texts, folder / "text.model", vocab_size=400)


def recipe(job: Job) -> RunConfig:
    """The run of a megavlm arm; its model and data are those of all arms."""
    bypass = {"policy": "shared_bypass", "keep_ratio": job.keep_ratio}
    routing = {"understanding": bypass, "generation": bypass, "dense_finish_fraction": 0.0} if job.arm == "route" else {}
    return RunConfig.model_validate(
        {
            "run_dir": f"{job.folder}/{job.arm}",
            "model": {
                "architecture": {
                    "model_type": "qwen3",
                    "hidden_size": job.width,
                    "intermediate_size": 3 * job.width,
                    "num_hidden_layers": job.num_layers,
                    "num_attention_heads": job.width // 64,
                    "num_key_value_heads": job.width // 64,
                    "head_dim": 64,
                    "max_position_embeddings": 4096,
                    "tie_word_embeddings": False,
                }
            },
            "vocabulary": {
                "text_model": f"{job.folder}/text.model",
                "image_tokenizer": {"kind": "pixel", "levels": 17, "height": 8, "width": 8},
            },
            "data": {
                "sources": {"drawing": {"shards": f"{job.folder}/train-{{00..{SHARDS - 1:02d}}}.tar"}},
                "num_lanes": job.ranks * job.packs_per_rank,
                "pack_tokens": job.pack_tokens,
                "unconditional_ratio": 0.0,
            },
            "routing": routing,
            # a constant learning rate: the end of the run, which nobody knows yet, plays no part
            "optimizer": {"num_steps": 10**6, "learning_rate": LEARNING_RATE, "min_lr_ratio": 1.0},
            "checkpoint": {"every_steps": 10**6},
            "engine": {"deepspeed": job.deepspeed, "timeout_s": FOREVER_S, "step_timeout_s": FOREVER_S},
            "faults": {"step_budget_s": FOREVER_S, "steady_step_budget_factor": 1e6},
        }
    )


def encoded(parts: Parts, folder: str, split: str) -> list[EncodedSample]:
    """All samples of a split, in the order of the shards."""
    urls = expand_shards(split, f"{folder}/{split}-{{00..{SHARDS - 1 if split == 'train' else 0:02d}}}.tar")
    return [
        parts.encoder(parse_sample(key, members, Coordinates(0, 0, shard, index)))
        for shard, url in enumerate(urls)
        for index, (key, members) in enumerate(read_shard(url))
    ]


def labels_of(sample: EncodedSample) -> np.ndarray:
    """What transformers takes: the tokens, with -100 where there is no loss ``[L]``."""
    return np.where(sample.has_loss, sample.tokens, -100)
