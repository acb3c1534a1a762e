"""The commands under `megavlm data` that train tokenizers and use them. Tested by `tests/cli/test_main.py`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from megavlm.cli.arguments import NotNegative, Positive
from megavlm.errors import ConfigError

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class TokenizerCommands:
    """A part of the commands of `megavlm data`, which inherit from it."""

    def tokenizer(self, shards, out: str, vocab_size: Positive = 32000, format: str = ""):
        """Train a SentencePiece model on texts.

        Args:
            shards: Path or URL of shards, or text files (.txt) with one text per line, each of its own format; braces expand:
                "data/{captions/000000.tar,questions/000000.tar,words.txt}".
            out: The .model file to write.
            vocab_size: Most pieces of the model.
            format: How samples of the shards are written; of each as its index says if not given.
        """
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.lint import Report, read_samples
        from megavlm.system.progress import progress
        from megavlm.vocabulary import train_text_model

        urls = expand_shards("shards", as_shards(shards))
        files = [Path(url) for url in urls if url.endswith(".txt")]
        sources = {url: source_of([url], format) for url in urls if not url.endswith(".txt")}
        report = Report()

        def texts() -> Iterator[str]:
            yield from _lines(files)
            for url, source in sources.items():
                for sample in read_samples([url], source, report):
                    yield from (segment.text for segment in sample.segments if segment.text is not None)

        counts = train_text_model(progress(texts(), "read texts"), Path(str(out)), vocab_size)
        read = [f"{len(files)} files"] if files else []
        read += [f"{report.num_samples} samples, {len(report.problems)} of them left out as broken"] if sources else []
        where = " and ".join(read)
        print(f"{out}: trained on {counts.texts} texts of {where}; {counts.empty} empty texts left out, {counts.divided} long ones divided")

    def image_tokenizer(
        self,
        shards,
        out: str,
        codebook_size: Positive = 512,
        height: Positive = 8,
        width: Positive = 8,
        pixels: Positive = 32,
        steps: Positive = 1500,
        batch_images: Positive = 32,
        learning_rate: float = 1e-3,
        channels: Positive = 64,
        max_images: Positive = 50_000,
        seed: int = 0,
        format: str = "",
        device: str = "",
    ):
        """Train a small VQ image tokenizer on the images of shards.

            megavlm data image-tokenizer "data/shapes/images-train-{0000..0019}.tar" data/vq

        Args:
            shards: Path or URL, braces expand.
            out: Folder to write, with reconstructions.png.
            codebook_size: Number of codes.
            height: Rows of codes per image.
            width: Columns of codes per image.
            pixels: Height of images: 2, 4, … 32 times --height.
            steps: Optimizer steps.
            batch_images: Images per step.
            learning_rate: Peak of the learning rate.
            channels: Width of the network, a multiple of 32.
            max_images: Most images to read.
            seed: Seed of weights and data order.
            format: How samples are written; as the indexes say if not given.
            device: cpu or cuda; by default cuda where there is a GPU.
        """
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.images import read_images
        from megavlm.image_tokenizers.vq_training import Plan, train_tokenizer

        plan = Plan(codebook_size, height, width, pixels, steps, batch_images, learning_rate, channels, max_images, seed)
        urls = expand_shards("shards", as_shards(shards))
        print(
            json.dumps(train_tokenizer(read_images(urls, source_of(urls, format)), Path(str(out)), plan, device or _devices()[0]), indent=1)
        )

    def encode(
        self,
        shards,
        out: str,
        tokenizer: str,
        height: NotNegative = 0,
        width: NotNegative = 0,
        fit: str = "crop",
        processes: NotNegative = 0,
    ):
        """Turn raw shards into pre-tokenised ones: every image becomes codes, all else stays. A second start resumes.

            megavlm data encode "data/shapes/{generation,understanding}-train-{0000..0019}.tar" data/shapes/codes --tokenizer=data/shapes/vq

        Args:
            shards: Path or URL of tars, braces expand.
            out: Folder to write to: shards of the same names, an index beside each, and image_tokenizer.json.
            tokenizer: Folder of a VQ model, or a recipe with an image tokenizer.
            height: Rows of codes, if a folder is given; a Janus model has a default.
            width: Columns of codes, if a folder is given.
            fit: What happens to images of other proportions, if a folder is given: crop, pad or squash.
            processes: Shards that are encoded at the same time; 0 is one per GPU, or one per core without a GPU.
        """
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.tokenize import encode_shards

        devices = _devices()
        made = _image_tokenizer(str(tokenizer), height, width, fit)
        num_processes = processes or (len(devices) if devices != ["cpu"] else len(os.sched_getaffinity(0)))
        urls = expand_shards("shards", as_shards(shards))
        encoded, there = encode_shards(urls, Path(str(out)), made, num_processes, devices=devices)
        print(f"{out}: {encoded} shards encoded, {there} were there")


def _lines(files: list[Path]) -> Iterator[str]:
    """The lines of text files."""
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{file}: line {number} is not UTF-8: {error}\n  do:    write text as UTF-8") from error


def as_shards(value) -> str | list[str]:
    """Shards as the command line gives them."""
    return [str(url) for url in value] if isinstance(value, (list, tuple)) else str(value)


def source_of(urls: list[str], format: str, image_root: str = ""):
    """A `SourceConfig` of the format that is given, or, without one, of that which the shards' indexes name.

    Raises:
        ConfigError: If there is no such format.
    """
    from megavlm.data.read.formats import find_format
    from megavlm.data.read.index import format_of
    from megavlm.data.read.source import SourceConfig

    name = format_of(urls, format or None)
    find_format(name)
    return SourceConfig(shards="none", format=name, image_root=image_root or None)


def _devices() -> list[str]:
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def _image_tokenizer(name: str, height: int, width: int, fit: str):
    """The image tokenizer of a folder or a recipe."""
    if not Path(name).is_dir():
        from megavlm.config import load_config
        from megavlm.image_tokenizers.build import build_image_tokenizer

        return build_image_tokenizer(load_config(name).vocabulary.image_tokenizer)
    from megavlm.image_tokenizers.fitting import Fit
    from megavlm.image_tokenizers.vq import VQTokenizer, read_vq_config

    default = getattr(read_vq_config(Path(name))[1], "num_patches", 0)
    if not (height or default) or not (width or default):
        raise ConfigError(f"{name} does not say how many codes an image has\n  do:    give --height and --width")
    if fit not in get_args(Fit):
        raise ConfigError(f"--fit={fit}: there is no such fit\n  do:    use one of {', '.join(get_args(Fit))}")
    return VQTokenizer(name, height or default, width or default, fit=cast(Fit, fit))
