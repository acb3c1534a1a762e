"""From a recipe to the parts of its run: what is found out when a run starts is kept with it and never found out again."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megavlm.config import RunConfig, load_config, save_config
from megavlm.data.pack.config import DataConfig
from megavlm.data.pack.mixture import held_share, token_shares
from megavlm.data.read.index import format_of
from megavlm.data.tools.tokenize import check_codes
from megavlm.errors import ConfigError
from megavlm.parts.fitness import check_heads, check_look_ahead, check_model
from megavlm.parts.parts import Parts
from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import checkpoints_in
from megavlm.runs.status import write_status
from megavlm.runs.user_files import keep_user_files
from megavlm.system.harmless import harmless
from megavlm.system.log_file import LogFile
from megavlm.system.world import World
from megavlm.vocabulary import copy_text_model, same_text_model

log = logging.getLogger(__name__)

FIXED = ("seed", "model.architecture", "vocabulary", "data.num_lanes")
"""Settings that the weights or the data's state depend on: a run cannot go on with others. Changed sources are the lanes' affair
(`data.when_sources_change`)."""

FOUND_FOR = ("data.sources", "data.pack_tokens", "data.pack_rows", "data.over_long", "data.unconditional_ratio")
"""Settings that the mixture was found out for."""


def resolve(config: RunConfig, folder: RunFolder, world: World) -> Parts:
    """Resolve the configuration, compare it with the folder's, and make the parts. Called by all ranks together.

    The folder keeps its own configuration until `keep`: the sources can still be refused when the newest intact checkpoint is known.

    Raises:
        ConfigError: If the folder holds a run that cannot go on with this configuration.
    """
    # rank 0 keeps what it has made on the way
    made: list[Parts] = []

    def resolve_alone() -> RunConfig:
        made.append(_resolve_alone(Parts(config, world.device), folder, world.size))
        return made[0].config

    resolved = world.on_main(resolve_alone)
    return made[0] if made else Parts(resolved, world.device)


def keep(config: RunConfig, folder: RunFolder) -> None:
    """Write a configuration with which the run goes on.

    Raises:
        ConfigError: If it cannot be written: what is trained from now on could not be read with the right settings.
    """
    with _writable():
        save_config(config, folder.config_file)


def _resolve_alone(parts: Parts, folder: RunFolder, world_size: int) -> Parts:
    with _writable():
        folder.path.mkdir(parents=True, exist_ok=True)
        logging.getLogger().addHandler(LogFile(folder.log_file))
    parts = _with_fingerprint(parts)
    config, tokenizer = parts.config, parts.image_tokenizer
    if all(source.epochs for source in config.data.sources.values()):
        raise ConfigError(
            "data.sources: every source ends after its `epochs`, at another step in each lane\n"
            "  do:    leave out `epochs` of one of them; optimizer.num_steps says when training ends"
        )
    for source in parts.sources:
        check_codes(list(source.urls), tokenizer)
        format_of(list(source.urls), config.data.sources[source.name].format, f"data.sources.{source.name}")
    parts = parts.replaced(data=config.data.model_copy(update={"sources": {source.name: source.config for source in parts.sources}}))
    config = parts.config
    if config.monitor.sample_every_steps and not tokenizer.has_decoder:
        raise ConfigError(
            "monitor.sample_every_steps: the image tokenizer cannot decode, so there is nothing to show\n"
            "  do:    set it to null, or choose another tokenizer"
        )
    if os.path.lexists(folder.config_file):
        parts = parts.replaced(data=_adopted(config, folder))
    elif checkpoints_in(folder.checkpoints):
        log.warning("%s is missing: the run goes on with this recipe, and nobody can say whether it is the same", folder.config_file)
    check_heads(parts)
    check_model(parts, world_size)
    parts = parts.with_mixture()
    _warn_of_growth(parts)
    check_look_ahead(parts, world_size)
    with _writable():
        _keep_text_model(Path(config.vocabulary.text_model), folder)
        keep_user_files(folder, config.routing.modules)
    # the watchdogs of this start would take an earlier one's note for their own
    for hang in folder.hangs.glob("step-????????"):
        with harmless(f"another name for {hang}"):
            hang.rename(hang.with_name(f"{hang.name}-{hang.stat().st_mtime_ns}"))
    with harmless(str(folder.status)):
        write_status(folder, state="starting")
    return parts


def _keep_text_model(source: Path, folder: RunFolder) -> None:
    """Copy the text model into the folder; another one than a checkpoint was trained with is refused."""
    kept = folder.text_model
    if os.path.realpath(source) == os.path.realpath(kept):
        return
    if os.path.lexists(kept) and checkpoints_in(folder.checkpoints):
        is_same = source.read_bytes() == kept.read_bytes() if source.is_file() and kept.is_file() else same_text_model(source, kept)
        if not is_same:
            raise ConfigError(
                f"vocabulary.text_model: {source} is no longer the model that the run in {folder.path} began with\n"
                f"  do:    restore it from {kept}; or from a copy, if that one is damaged; or give another run_dir"
            )
    copy_text_model(source, kept)


@contextmanager
def _writable() -> Iterator[None]:
    """Around what a run cannot begin without."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise ConfigError(
            f"run_dir: {place}{error.strerror}\n  do:    name a folder that can be written; make room if the disk is full"
        ) from error


def _warn_of_growth(parts: Parts) -> None:
    """Say what packs will hold in a later phase, where they hold less at first: a device that is full now would overflow then."""
    data = parts.config.data
    if data.pack_rows:
        return
    shares = token_shares(parts.mixture, data)
    held = {step: held_share(parts.mixture, shares, parts.costing, step) for step in parts.phases.first_steps}
    most = max(held, key=held.__getitem__)
    if held[0] < 0.95 * held[most]:
        log.warning(
            "from step %d on %s, and packs hold %.2f times as much for the backward pass as now; if they do not fit then,"
            " lower data.pack_tokens, or set data.pack_rows=%d: packs then hold no more than now at any moment",
            *(
                most,
                "everything is kept" if held[most] > 0.999 else "more is kept",
                held[most] / held[0],
                math.ceil(held[0] * data.pack_tokens),
            ),
        )


def _with_fingerprint(parts: Parts) -> Parts:
    """With the fingerprint of the image tokenizer's weights, where it has any; reads them."""
    config = parts.config
    tokenizer = config.vocabulary.image_tokenizer
    if tokenizer.kind == "pixel":
        return parts
    named = tokenizer.model_copy(update={"fingerprint": parts.image_tokenizer.fingerprint})
    return parts.replaced(vocabulary=config.vocabulary.model_copy(update={"image_tokenizer": named}))


def _adopted(config: RunConfig, folder: RunFolder) -> DataConfig:
    """Check ``config`` against the folder's and take over what was resolved when the run began."""
    try:
        before = load_config(str(folder.config_file))
    except ConfigError as error:
        raise ConfigError(
            f"{folder.config_file} is not the recipe that the run began with: {str(error).split('  do:')[0].strip()}\n"
            "  do:    bring it back from a copy; or remove it, and the run goes on with the recipe as it is given"
        ) from error
    old, new = _flatten(before.model_dump()), _flatten(config.model_dump())
    differences = [
        (name, old.get(name), new.get(name))
        for name in old | new
        if old.get(name) != new.get(name) and not name.startswith("data.mixture.")
    ]
    fixed = [d for d in differences if any(d[0] == name or d[0].startswith(name + ".") for name in FIXED)]
    if fixed and checkpoints_in(folder.checkpoints):
        lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, old, new in fixed)
        raise ConfigError(
            f"{folder.path} holds a run with other settings, and cannot go on with these:\n{lines}\n"
            "  do:    give another run_dir, or remove the folder"
        )
    for name, old, new in differences:
        log.warning("going on with a changed setting: %s: %r -> %r", name, old, new)
    # what was found out about other sources, or other pieces of their samples, is worth nothing
    if fixed or any(name in FOUND_FOR for name, _, _ in differences):
        return config.data
    return config.data.model_copy(update={"mixture": before.data.mixture})


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path → value. The sources stay one value: their order counts."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict) and prefix + name != "data.sources":
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value.items()) if isinstance(value, dict) else value
    return flat
