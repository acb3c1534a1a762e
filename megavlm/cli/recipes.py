"""The command `megavlm init` and those under `megavlm recipe`. Tested by `tests/launch/test_init.py`."""

import sys
from pathlib import Path

from megavlm.cli.arguments import NotNegative
from megavlm.errors import ConfigError

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class RecipeCommands:
    """Explain a recipe, and look it over before it costs anything."""

    def show(self, recipe: str, **overrides):
        """Print every setting with its value, default, unit and meaning.

        Args:
            recipe: Path of a YAML file, or a name such as `digits`.
            overrides: Settings to change.
        """
        from megavlm.config import load_config
        from megavlm.config.reference import describe

        print("\n".join(describe(load_config(str(recipe), overrides))))

    def check(self, recipe: str, samples: NotNegative = 1000, **overrides):
        """Find every mistake of a recipe and of its data. The exit status is 1 if there are any.

        Args:
            recipe: Path of a YAML file, or a name such as `digits`.
            samples: The first samples of each source that are read; 0 is all.
            overrides: Settings to change.
        """
        from megavlm.config import load_config
        from megavlm.launch.check import Check

        check = Check(load_config(str(recipe), overrides), samples)
        check.run()
        print("\n".join([*check.facts, *check.problems]))
        print(f"{recipe}: {len(check.problems)} kinds of problems" if check.problems else f"{recipe}: nothing is wrong")
        if check.problems:
            sys.exit(1)


class InitCommand:
    """A part of the commands of `megavlm`, which inherit from it."""

    def init(
        self,
        recipe: str,
        data: str = "",
        text_model: str = "",
        image_tokenizer: str = "",
        backbone: str = "",
        steps: NotNegative = 0,
        run_dir: str = "",
    ):
        """Write a recipe with comments for data of your own. In a terminal it asks for what is not given. See docs/own-data.md.

            megavlm init mine.yaml --data=data/captions,data/questions

        Args:
            recipe: The YAML file to write.
            data: Folders of shards, or patterns, separated by commas; OUT/held-out of `megavlm data build` becomes validation.
            text_model: SentencePiece file, or folder with tokenizer.json; by default the backbone's.
            image_tokenizer: Folder of a VQ model; or pixel:HEIGHTxWIDTH, which sees grey levels. By default pixel:8x8.
            backbone: tiny, small, or the folder of a pretrained model. By default tiny.
            steps: Optimizer steps; 0 is 20 epochs.
            run_dir: Folder of the run; by default runs/ and the recipe's name.
        """
        from megavlm.launch.init import Wish, write_recipe

        file = Path(recipe)
        asks = sys.stdin.isatty() and not data
        data = data or _asked(asks, "data", "folders of shards, separated by commas")
        backbone = backbone or _asked(asks, "backbone", "tiny, small, or a folder", "tiny")
        has_tokenizer = (Path(backbone) / "tokenizer.json").is_file()
        text_model = text_model or _asked(asks, "text_model", "SentencePiece file or a folder", backbone if has_tokenizer else "")
        image_tokenizer = image_tokenizer or _asked(asks, "image_tokenizer", "folder of a VQ model, or pixel:8x8", "pixel:8x8")
        steps = steps or int(_asked(asks, "steps", "optimizer steps, 0 is 20 epochs", "0"))
        run_dir = run_dir or _asked(asks, "run_dir", "folder of the run", f"runs/{file.stem}")
        wish = Wish(
            data=_divided(data),
            text_model=text_model,
            image_tokenizer=image_tokenizer,
            backbone=backbone,
            steps=steps,
            run_dir=run_dir,
        )
        print(write_recipe(file, wish))
        print(f"{recipe}: look it over with `megavlm recipe check {recipe}`, train it with `megavlm train {recipe}`")


def _asked(asks: bool, name: str, what: str, default: str = "") -> str:
    """What the user types, where there is a terminal; else the default."""
    given = (input(f"{name} ({what}){f' [{default}]' if default else ''}: ").strip() if asks else "") or default
    if not given:
        raise ConfigError(f"init: {name} is missing\n  do:    give --{name}=…: {what}")
    return given


def _divided(text: str) -> list[str]:
    """At commas that stand in no braces."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
