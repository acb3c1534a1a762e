"""The commands under `megavlm data`. Tested by `tests/cli/test_main.py`."""

import os
from pathlib import Path

from megavlm.cli.arguments import NotNegative, Positive
from megavlm.cli.compressors import CompressorCommands
from megavlm.cli.tokenizers import TokenizerCommands, as_shards, source_of
from megavlm.errors import ConfigError

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class DataCommands(TokenizerCommands, CompressorCommands):
    """Write data, inspect it, and simulate how it packs."""

    def digits(self, out: str):
        """Write the benchmark `digits`: shards and text model.

        It has real handwritten digits, 8x8 pixels, as questions about images and as requests for images.

        Args:
            out: Folder to write to.
        """
        from megavlm.benchmarks import digits

        written = digits.write(Path(str(out)))
        print(f"{out}: {len(written)} shards with {sum(written.values())} samples, and text.model")

    def shapes(self, out: str, pixels: int = 32, num_train: Positive = 20000, num_test: Positive = 1000, seed: int = 0):
        """Write the benchmark `shapes`: shards and text model.

        It has scenes of one to four coloured shapes, as questions with exact answers and as requests for images.

        Args:
            out: Folder to write to.
            pixels: Side of the images, 32 to 256.
            num_train: Training samples per task.
            num_test: Test samples per task; each shows a composition that is not in the training samples.
            seed: Seed of the scenes.
        """
        from megavlm.benchmarks import shapes

        written = shapes.write(Path(str(out)), pixels, num_train, num_test, seed=seed)
        print(f"{out}: {len(written)} shards with {sum(written.values())} samples, and text.model")

    def index(self, shards, format: str = ""):
        """Count local shards and write an index beside each: shard.tar.index.json.

        Args:
            shards: Path, braces expand.
            format: How samples are written; it is kept in the index, where every tool and recipe finds it.
        """
        from megavlm.data.read.formats import find_format
        from megavlm.data.read.index import write_index
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.read.urls import is_local, local_path
        from megavlm.system.progress import progress

        if format:
            find_format(format)
        for url in progress(expand_shards("shards", as_shards(shards)), "index"):
            if not is_local(url):
                raise ConfigError(f"{url} is not a local file\n  do:    write the index where the shard is, and copy both")
            print(f"{url}: {write_index(Path(local_path(url)), format or None).samples} samples")

    def build(self, source: str, out: str, samples_per_shard: Positive = 1000, image_root: str = "", held_out: float = 0.0):
        """Write shards from images with captions, JSONL, or a table.

        An index lies beside each shard. See docs/own-data.md.

            megavlm data build photos data/captions --held_out=0.1
            megavlm data build "vqa/train-*.parquet" data/vqa

        Args:
            source: Folder with a.jpg, a.txt, …; or a file of lines with "question" and "answer", "caption", "conversations" or "segments";
                or a Parquet or Arrow file, a pattern of them, or a folder of Hugging Face datasets.
            out: Folder to write to.
            samples_per_shard: Samples in each shard but the last.
            image_root: Folder that image paths start from; by default the file's own folder.
            held_out: Share of the pictures, 0 to 1, whose samples go to OUT/held-out; the same pictures in every file.
        """
        from megavlm.data.tools.write import HELD_OUT, build_shards

        root = Path(str(image_root)) if image_root else None
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out: {held_out} is no share\n  do:    give a number from 0 to below 1: --held_out=0.1")
        written = build_shards(Path(str(source)), Path(str(out)), samples_per_shard, root, held_out=held_out)
        held = sum(number for name, number in written.items() if name.startswith(HELD_OUT))
        print(f"{out}: {len(written)} shards with {sum(written.values())} samples{f', {held} of them held out' * bool(held)}")

    def inspect(self, shards, format: str = "", out: str = "contact_sheet.png", image_root: str = "", recipe: str = "", **overrides):
        """Show the contents of shards: a table, every problem with its place, and a contact sheet.

        Args:
            shards: Path or URL, braces expand: "data/digits/generation-train-{00..07}.tar".
            format: How samples are written; as the indexes say if not given.
            out: Where the contact sheet goes (PNG).
            image_root: Folder of the images that llava and qa name, if not in the shards.
            recipe: Also count the images that its image tokenizer cuts or squashes.
            overrides: Settings of the recipe to change.
        """
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.inspect import inspect

        urls = expand_shards("shards", as_shards(shards))
        losses = _fit_losses(recipe, overrides)
        text, has_images = inspect(urls, source_of(urls, format, image_root), Path(str(out)), losses.add if losses else None)
        print("".join(f"{line}\n" for line in losses.lines()) if losses else "", end="")
        print(f"{text}{f'contact sheet: {out}' if has_images else 'no images, no contact sheet'}")

    def lint(self, shards, format: str = "", recipe: str = "", each: bool = False, image_root: str = "", **overrides):
        """Find the problems in shards. The exit status is 1 if there are any.

        Problems of one kind are one entry, with their number and the shard and key of the first.

        Args:
            shards: Path or URL, braces expand.
            format: How samples are written; as the indexes say if not given.
            recipe: Also check that samples fit its vocabulary and packs; count cut images.
            each: Print every problem with its place.
            image_root: Folder of the images that llava and qa name, if not in the shards.
            overrides: Settings of the recipe to change.
        """
        import sys

        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.lint import lint

        check = lambda sample: None  # noqa: E731
        losses = _fit_losses(recipe, overrides)
        if recipe:
            from megavlm.config import load_config
            from megavlm.data.pack.overlong import encode_within
            from megavlm.parts.parts import Parts

            config = load_config(recipe, overrides)
            encoder = Parts(config).encoder

            def check(sample):
                if losses:
                    losses.add(sample)
                encode_within(sample, encoder, config.data.sample_tokens, config.data.over_long)

        urls = expand_shards("shards", as_shards(shards))
        report = lint(urls, source_of(urls, format, image_root), check)
        print("".join(f"{line}\n" for line in losses.lines()) if losses else "", end="")
        for problem in report.problems if each else report.grouped():
            print(problem)
        print(f"{report.num_samples} samples, {len(report.problems)} problems")
        if report.problems:
            sys.exit(1)

    def stats(self, shards, format: str = "", recipe: str = "", out: str = "stats.png", **overrides):
        """Count samples, tasks, images and lengths. Lengths are tokens with a recipe, otherwise characters.

        Args:
            shards: Path or URL, braces expand.
            format: How samples are written; as the indexes say if not given.
            recipe: The recipe whose tokenizers count the tokens.
            out: Histogram to write (PNG).
            overrides: Settings of the recipe to change.
        """
        import json

        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.describe import stats

        encoder = None
        if recipe:
            from megavlm.config import load_config
            from megavlm.parts.parts import Parts

            encoder = Parts(load_config(recipe, overrides)).encoder
        urls = expand_shards("shards", as_shards(shards))
        print(json.dumps(stats(urls, source_of(urls, format), Path(str(out)), encoder), indent=1))

    def preview(self, shards, format: str = "", out: str = "preview.png", num: Positive = 40):
        """Show the first samples: a contact sheet (PNG) and a page with the whole texts (HTML).

        Args:
            shards: Path or URL, braces expand.
            format: How samples are written; as the indexes say if not given.
            out: The contact sheet (PNG); the page goes beside it.
            num: Number of samples.
        """
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.describe import preview

        path = Path(str(out))
        urls = expand_shards("shards", as_shards(shards))
        report, has_images = preview(urls, source_of(urls, format), path, num)
        written = f"{path} and {path.with_suffix('.html')}" if has_images else f"{path.with_suffix('.html')}, no images for {path}"
        print(f"{written}, {len(report.problems)} problems on the way")

    def simulate(
        self,
        recipe: str = "",
        lanes: Positive = 512,
        steps: Positive = 400,
        first_step: NotNegative = 200,
        out: str = "simulate.png",
        processes: NotNegative = 0,
        **overrides,
    ):
        """Say how equal the packs will be: run the packer for all lanes, and first-come and first-fit packing for comparison.

            megavlm data simulate --lanes 1024
            megavlm data simulate digits --lanes 64 --data.fill=0.9

        Args:
            recipe: The recipe with sources, route and model; by default a standard mixture (see `megavlm.data.tools.simulate`).
            lanes: Number of lanes.
            steps: Packs per lane.
            first_step: First step that counts for the figures.
            out: Figure to write (PNG); the numbers go beside it (JSON).
            processes: Processes to use; 0 is one per core.
            overrides: Settings of the recipe to change.
        """
        import json

        from megavlm.data.tools.simulate import report, simulate, standard

        if recipe:
            from megavlm.config import load_config
            from megavlm.parts.parts import situation_of

            situation = situation_of(load_config(recipe, overrides))
        elif overrides:
            raise ConfigError(f"there is no recipe to change {', '.join(overrides)} in\n  do:    name a recipe")
        else:
            situation = standard()
        result = simulate(situation, lanes, steps, first_step, num_processes=processes or len(os.sched_getaffinity(0)))
        title = f"{lanes} lanes, steps {first_step} to {steps}, {recipe or 'the standard mixture'}"
        print(json.dumps(report(result, Path(str(out)), title), indent=1))


def _fit_losses(recipe: str, overrides: dict):
    """Counts what the image tokenizer of a recipe does to images of other proportions; None without a recipe."""
    if not recipe:
        return None
    from megavlm.config import load_config
    from megavlm.data.tools.fit_losses import Losses
    from megavlm.image_tokenizers.build import build_image_tokenizer

    return Losses(build_image_tokenizer(load_config(recipe, overrides).vocabulary.image_tokenizer))
