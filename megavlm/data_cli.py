"""The commands under `megavlm data`."""

import os
from pathlib import Path

from megavlm.errors import ConfigError

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class DataCommands:
    """Write data, look at it, and try how it packs."""

    def digits(self, out: str):
        """Write the benchmark `digits` as WebDataset shards, with its text model.

        Real handwritten digits, 8x8 pixels, as questions about images and as requests for images.

        Args:
            out: Folder to write to.
        """
        from megavlm.benchmarks import digits

        written = digits.write(Path(str(out)))
        print(f"{out}: {len(written)} shards with {sum(written.values())} samples, and text.model")

    def inspect(self, shards, out: str = "contact_sheet.png"):
        """Show what is in shards: a table, every problem with its place, and a contact sheet.

        Args:
            shards: Path or URL, braces expand: "data/digits/generation-train-{00..07}.tar".
            out: Where the contact sheet goes (PNG).
        """
        from megavlm.data.inspect import inspect

        print(inspect(_shards(shards), Path(str(out))), end="")
        print(f"contact sheet: {out}")

    def index(self, shards):
        """Count local shards and write an index beside each: shard.tar.index.json.

        Args:
            shards: Path, braces expand.
        """
        from megavlm.data.index import write_index
        from megavlm.data.shards import expand_shards
        from megavlm.data.urls import is_local, local_path

        for url in expand_shards("shards", _shards(shards)):
            if not is_local(url):
                raise ConfigError(f"{url} is not a local file\n  do:    write the index where the shard is, and copy both")
            print(f"{url}: {write_index(Path(local_path(url))).samples} samples")

    def simulate(
        self,
        recipe: str = "",
        lanes: int = 512,
        steps: int = 400,
        first_step: int = 200,
        out: str = "simulate.png",
        processes: int = 0,
        **overrides,
    ):
        """How equal will the packs be? Runs the packer for all lanes, beside first-come and first-fit packing.

            megavlm data simulate --lanes 1024
            megavlm data simulate digits --lanes 64 --data.fill=0.9

        Args:
            recipe: Whose sources, route and model to take; without one, a standard mixture (see `megavlm.data.simulate`).
            lanes: Number of lanes.
            steps: Packs per lane.
            first_step: Figures are of the steps from this one on.
            out: Figure to write (PNG); the numbers go beside it (JSON).
            processes: Processes to use; 0 is one per core.
            overrides: Settings of the recipe to change.
        """
        import json

        from megavlm.data.simulate import report, simulate, sketch

        if recipe:
            from megavlm.build import situation_of
            from megavlm.config import load_config

            situation = situation_of(load_config(recipe, overrides))
        elif overrides:
            raise ConfigError(f"there is no recipe to change {', '.join(overrides)} in\n  do:    name a recipe")
        else:
            situation = sketch()
        result = simulate(situation, lanes, steps, first_step, processes or len(os.sched_getaffinity(0)))
        title = f"{lanes} lanes, steps {first_step} to {steps}, {recipe or 'the standard mixture'}"
        print(json.dumps(report(result, Path(str(out)), title), indent=1))


def _shards(value) -> str | list[str]:
    return [str(url) for url in value] if isinstance(value, (list, tuple)) else str(value)
