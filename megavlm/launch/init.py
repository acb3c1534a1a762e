"""`megavlm init`: from shards to a recipe with comments, which `megavlm recipe check` passes. Tested by `tests/launch/test_init.py`."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.sources import Source
from megavlm.data.read.index import format_of, read_index
from megavlm.data.read.sample import Sample
from megavlm.data.read.shards import expand_shards
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.write import HELD_OUT
from megavlm.errors import ConfigError
from megavlm.evaluation.held_out import read_held_out
from megavlm.image_tokenizers.build import ImageTokenizer
from megavlm.image_tokenizers.protocol import GridOnly
from megavlm.routing.tasks import TASKS
from megavlm.system.files import write_atomically
from megavlm.vocabulary import Vocabulary

NUM_LOOKED_AT = 200
"""Samples of each source whose lengths are counted."""
EPOCHS = 20
NUM_LANES = 4
BACKBONES = {"tiny": (128, 384, 4, 4, 32, 2e-3), "small": (512, 1536, 8, 8, 64, 6e-4)}
"""Name → width, MLP width, layers, heads and head width of a Qwen3 with random weights; its peak learning rate."""
PRETRAINED_RATE = 5e-5


@dataclass
class Wish:
    """What the user said."""

    data: list[str]
    """Folders of shards, or patterns of them."""
    text_model: str
    image_tokenizer: str
    """`pixel`, `pixel:HEIGHTxWIDTH`, or the folder of a VQ model."""
    backbone: str
    """One of `BACKBONES`, or the folder of a pretrained model."""
    steps: int
    """0 is as many as make `EPOCHS` epochs."""
    run_dir: str


@dataclass
class Found:
    """What the shards of one source hold."""

    name: str
    pattern: str
    held_out: str | None
    num_samples: int
    sample_format: str
    encoded: list[EncodedSample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def write_recipe(path: Path, wish: Wish) -> str:
    """Look at the data and write a recipe.

    Returns:
        What was found, in words.

    Raises:
        MegavlmError: If the file is there already, or what was named cannot be used.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already\n  do:    name another file, or remove it")
    if wish.backbone not in BACKBONES and not (Path(wish.backbone) / "config.json").is_file():
        raise ConfigError(
            f"backbone: {wish.backbone!r} is none of {', '.join(BACKBONES)}, and no folder with config.json\n  do:    give one of them"
        )
    block, tokenizer = _image_tokenizer(wish.image_tokenizer)
    encoder = Encoder(Vocabulary(wish.text_model, tokenizer.codebook_size), GridOnly(tokenizer))
    found = [_look_at(named, encoder) for named in wish.data]
    if len({source.name for source in found}) < len(found):
        raise ConfigError("data: two folders have the same name\n  do:    rename one: sources are called as their folders")
    path.parent.mkdir(parents=True, exist_ok=True)
    text, summary = _recipe(path, wish, found, block, tokenizer=tokenizer)
    write_atomically(path, text)
    return summary


def _look_at(named: str, encoder: Encoder) -> Found:
    folder, held_out = Path(named), None
    if folder.is_dir():
        pattern = _pattern_in(folder)
        held_out = _pattern_in(folder / HELD_OUT) if (folder / HELD_OUT).is_dir() else None
        name = folder.name
    else:
        pattern, name = named, re.sub(r"\W+", "_", Path(named.split("{", maxsplit=1)[0]).stem).strip("_") or "data"
    urls = expand_shards("", pattern)
    sample_format = format_of(urls, None)
    source = Source(name, tuple(urls), SourceConfig(shards=pattern, format=sample_format))
    samples = read_held_out(source, NUM_LOOKED_AT)
    counts = [index.samples for url in urls if (index := read_index(url))]
    num_samples = sum(counts) if len(counts) == len(urls) else len(samples)
    return Found(name, pattern, held_out, num_samples, sample_format, [encoder(sample) for sample in samples], samples)


def _pattern_in(folder: Path) -> str:
    """The pattern of the shards in a folder: numbers in braces where they are named by numbers that leave none out."""
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith((".tar", ".jsonl")))
    if not names:
        raise ConfigError(f"data: {folder} holds no shards\n  do:    write some with `megavlm data build`, or name a pattern")
    stems = [name.removesuffix(".tar") for name in names]
    if len(names) > 1 and stems == [f"{number:0{len(stems[0])}d}" for number in range(len(names))]:
        return f"{folder}/{{{stems[0]}..{stems[-1]}}}.tar"
    return f"{folder}/{names[0]}" if len(names) == 1 else f"{folder}/{{{','.join(names)}}}"


def _image_tokenizer(given: str) -> tuple[str, ImageTokenizer]:
    """The block of the recipe, and the tokenizer."""
    from megavlm.image_tokenizers.pixel import PixelTokenizer
    from megavlm.image_tokenizers.vq import VQTokenizer, read_vq_config

    if size := re.fullmatch(r"pixel(?::(\d+)x(\d+))?", given):
        height, width = (int(number or 8) for number in size.groups())
        return f"{{kind: pixel, levels: 17, height: {height}, width: {width}}}  # grey levels", PixelTokenizer(17, height, width)
    side = getattr(read_vq_config(Path(given))[1], "num_patches", 0) or 24
    return f"{{kind: vq, path: {_quoted(given)}, height: {side}, width: {side}}}", VQTokenizer(given, side, side)


def _recipe(path: Path, wish: Wish, found: list[Found], image_tokenizer: str, *, tokenizer: ImageTokenizer) -> tuple[str, str]:
    encoded = [sample for source in found for sample in source.encoded]
    longest = max(sample.num_tokens for sample in encoded)
    pack_tokens = max(1024, 256 * math.ceil(4 * longest / 256))
    num_tokens = sum(source.num_samples * np.mean([sample.num_tokens for sample in source.encoded]) for source in found)
    step_tokens = 0.95 * NUM_LANES * pack_tokens
    steps = wish.steps or max(100, round(EPOCHS * num_tokens / step_tokens))
    every = max(1, steps // 5)
    is_pretrained = wish.backbone not in BACKBONES
    rate = PRETRAINED_RATE if is_pretrained else BACKBONES[wish.backbone][-1]
    architecture = _quoted(wish.backbone) if is_pretrained else _architecture(wish.backbone)
    has_held_out = any(source.held_out for source in found)
    prompts = _prompts(found) if tokenizer.has_decoder else []
    labels = {task: sum(int((sample.has_loss & (sample.tasks == task)).sum()) for sample in encoded) for task in range(len(TASKS))}
    of_task = {task: max(1, sum(sample.task == task for sample in encoded)) for task in labels}
    has_short_answers = 0 < labels[0] / of_task[0] < labels[1] / of_task[1] / 8
    described = [f"{source.name}: {source.num_samples} samples of the format {source.sample_format}" for source in found]
    lines = [
        "# Written by `megavlm init`. `megavlm recipe check` looks it over, `megavlm recipe show` explains every setting.",
        f"#   torchrun --standalone --nproc-per-node 2 -m megavlm train {path}",
        f"run_dir: {_quoted(wish.run_dir)}        # everything that the run writes; the same command goes on with it",
        "seed: 0",
        "",
        "model:",
        f"  architecture: {architecture}",
        *([f"init_from: {_quoted(wish.backbone)}   # its weights"] if is_pretrained else []),
        "",
        "vocabulary:",
        f"  text_model: {_quoted(wish.text_model)}",
        f"  image_tokenizer: {image_tokenizer}",
        "",
        "data:",
        "  sources:",
        *(f"    {_quoted(s.name)}: {{shards: {json.dumps(s.pattern)}, weight: {s.num_samples}}}   # {s.sample_format}" for s in found),
        f"  num_lanes: {NUM_LANES}          # packs per step, shared by 1, 2 or 4 processes",
        f"  pack_tokens: {pack_tokens}     # the longest sample that was looked at has {longest}",
        "  look_ahead_samples: 64",
        "",
        *_loss(has_short_answers),
        "optimizer:",
        f"  num_steps: {steps}         # {steps * step_tokens / num_tokens:.1f} epochs of {num_tokens:.0f} tokens",
        f"  learning_rate: {rate:g}",
        f"  warmup_steps: {max(1, steps // 10)}",
        "",
        f"checkpoint: {{every_steps: {every}, keep_last: 2{', keep_best: 1, best_metric: validation/loss' * has_held_out}}}",
        "",
        f"engine: {{deepspeed: {'zero3' if is_pretrained else 'zero3_small'}}}",
        "",
        f"monitor: {{log_every_steps: {max(1, min(25, steps // 20))}{f', sample_every_steps: {every}' * bool(prompts)}}}",
        "",
    ]
    if prompts:
        lines[-2] = lines[-2].removesuffix("}")
        lines[-2] = f"{lines[-2]}, sample_prompts: {json.dumps(prompts, ensure_ascii=False)}}}  # drawn on the way"
    if has_held_out:
        lines += [
            "validation:          # losses of held-out samples; `megavlm evaluate` judges them",
            "  sources:",
            *(f"    {_quoted(s.name)}: {{shards: {json.dumps(s.held_out)}}}" for s in found if s.held_out),
            f"  every_steps: {every}",
            "",
        ]
    lines += ["evaluation: {num_drawings: 20, temperature: 0.9, guidance: 2.0}"]
    summary = "\n".join([*described, f"{steps} steps of {NUM_LANES} packs of up to {pack_tokens} tokens"])
    return "\n".join(lines) + "\n", summary


def _architecture(name: str) -> str:
    width, mlp_width, layers, heads, head_width, _ = BACKBONES[name]
    return (
        f"{{model_type: qwen3, hidden_size: {width}, intermediate_size: {mlp_width}, num_hidden_layers: {layers},\n"
        f"    num_attention_heads: {heads}, num_key_value_heads: {heads}, head_dim: {head_width}}}"
    )


def _quoted(text: str) -> str:
    """As YAML: in quotes where it could mean something else."""
    return text if re.fullmatch(r"[A-Za-z_.~/][\w./-]*", text) and text not in ("true", "false", "null", "~") else json.dumps(text)


def _loss(has_short_answers: bool) -> list[str]:
    if not has_short_answers:
        return []
    return [
        "loss:",
        "  # answers are short, images long: with equal mean losses the answers would outweigh the images",
        "  task_weights: {understanding: 0.3, generation: 1.0}",
        "",
    ]


def _prompts(found: list[Found]) -> list[str]:
    """What the first drawn samples ask for."""
    drawn = [sample for source in found for sample in source.samples if sample.task == "generation" and sample.segments[0].text]
    return list(dict.fromkeys(str(sample.segments[0].text)[:200] for sample in drawn))[:4]
