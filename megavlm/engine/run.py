"""The run folder: everything that a run writes, under names that explain themselves.

    config.yaml       the resolved recipe          checkpoints/      see `megavlm.engine.checkpoint`
    text.model        its text tokenizer, a SentencePiece file or a folder with tokenizer.json
    samples/          drawings made on the way, PNG
    log.txt           what was printed             tensorboard/      tensorboard --logdir
    evaluation.json   written by `megavlm evaluate`, with drawings.png
    judged/           written by `megavlm judge`
    analysis/         written by `megavlm analyze`
    status.json       where it stands              exit_code         how it ended; not there while it runs
    stragglers.txt    times per rank               forensics/        skipped steps
    hangs/            stacks of hung steps         environment.json  versions, hardware, command; of every start
    save, stop        touch them: the run saves, or saves and ends
    slurm/            sbatch scripts that `megavlm submit` rendered, and what the jobs printed
"""

import logging
from pathlib import Path
from typing import Any

from megavlm.build import build_image_tokenizer, with_fingerprint, with_mixture
from megavlm.config import RunConfig, load_config, save_config
from megavlm.data.sources import make_sources
from megavlm.data.tokenize import check_codes
from megavlm.engine.manifest import complete_checkpoints
from megavlm.engine.distributed import World
from megavlm.errors import ConfigError, MegavlmError
from megavlm.vocabulary import copy_text_model

log = logging.getLogger(__name__)

FIXED = ("seed", "model.architecture", "vocabulary", "data.num_lanes")
"""Settings that the weights or the data's state depend on: a run cannot go on with others. Changed sources are the lanes' affair
(`data.when_sources_change`)."""


class RunFolder:
    """Paths of a run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.text_model = self.path / "text.model"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.log_file = self.path / "log.txt"
        self.evaluation = self.path / "evaluation.json"
        self.status = self.path / "status.json"
        self.exit_code = self.path / "exit_code"
        self.stragglers = self.path / "stragglers.txt"
        self.forensics = self.path / "forensics"
        self.hangs = self.path / "hangs"
        self.environment = self.path / "environment.json"

    def prepare(self, config: RunConfig, world: World) -> RunConfig:
        """Resolve the configuration and compare it with the folder's. Called by all ranks together.

        The folder keeps its own until `keep`: the sources can still be refused when the newest intact checkpoint is known.

        Raises:
            ConfigError: If the folder holds a run that cannot go on with this configuration.
        """
        if world.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                logging.getLogger().addHandler(_file_handler(self.log_file))
            except OSError as error:
                raise ConfigError(f"run_dir: {error.filename}: {error.strerror}\n  do:    name a folder that can be written") from error
            config = with_fingerprint(config)
            if all(source.epochs for source in config.data.sources.values()):
                raise ConfigError(
                    "data.sources: every source ends after its `epochs`, at another step in each lane\n"
                    "  do:    leave out `epochs` of one of them; optimizer.num_steps says when training ends"
                )
            tokenizer = build_image_tokenizer(config)
            for source in make_sources(config.data.sources):
                check_codes(source.urls, tokenizer)
            if config.monitor.sample_every_steps and not tokenizer.has_decoder:
                raise ConfigError(
                    "monitor.sample_every_steps: the image tokenizer cannot decode, so there is nothing to show\n"
                    "  do:    set it to null, or choose another tokenizer"
                )
            if self.config_file.exists():
                config = self._adopt(config)
            config = with_mixture(config)
            if Path(config.vocabulary.text_model).resolve() != self.text_model.resolve():
                copy_text_model(Path(config.vocabulary.text_model), self.text_model)
            self.exit_code.unlink(missing_ok=True)
            # the watchdogs of this start would take an earlier one's note for their own
            for folder in self.hangs.glob("step-????????"):
                folder.rename(folder.with_name(f"{folder.name}-{folder.stat().st_mtime_ns}"))
        return world.gather(config if world.is_main else None)[0]

    def keep(self, config: RunConfig) -> None:
        """Write a configuration with which the run goes on."""
        save_config(config, self.config_file)

    def _adopt(self, config: RunConfig) -> RunConfig:
        """Check ``config`` against the folder's and take over what was resolved when the run began."""
        before = load_config(str(self.config_file))
        old, new = _flatten(before.model_dump()), _flatten(config.model_dump())
        differences = [
            (name, old.get(name), new.get(name))
            for name in old | new
            if old.get(name) != new.get(name) and not name.startswith("data.mixture.")
        ]
        fixed = [d for d in differences if any(d[0] == name or d[0].startswith(name + ".") for name in FIXED)]
        if fixed and complete_checkpoints(self.checkpoints):
            lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, old, new in fixed)
            raise ConfigError(
                f"{self.path} holds a run with other settings, and cannot go on with these:\n{lines}\n"
                "  do:    give another run_dir, or remove the folder"
            )
        for name, old, new in differences:
            log.warning("going on with a changed setting: %s: %r -> %r", name, old, new)
        # what was found out about other sources is worth nothing
        if fixed or any(name == "data.sources" for name, _, _ in differences):
            return config
        return config.model_copy(update={"data": config.data.model_copy(update={"mixture": before.data.mixture})})

    def load(self, overrides: dict[str, Any] | None = None) -> tuple[RunConfig, Path]:
        """The configuration of a run and its newest checkpoint."""
        config = self.load_config(overrides)
        checkpoints = complete_checkpoints(self.checkpoints)
        if not checkpoints:
            raise MegavlmError(f"{self.path} has no complete checkpoint\n  do:    let the run reach its first checkpoint")
        return config, checkpoints[-1]

    def load_config(self, overrides: dict[str, Any] | None = None) -> RunConfig:
        """The configuration of a run, with its own copy of the text model."""
        if not self.config_file.is_file():
            raise MegavlmError(f"{self.path} is not a run folder: it has no config.yaml\n  do:    train a recipe first")
        return load_config(str(self.config_file), {"vocabulary.text_model": str(self.text_model)} | (overrides or {}))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path → value. The sources stay one value: their order counts."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict) and prefix + name != "data.sources":
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value.items()) if isinstance(value, dict) else value
    return flat


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
