"""Reading and writing recipes.

``load_config`` reports *all* mistakes of a recipe and its overrides at once, each with its dotted path, the value
that was given and, for a name that does not exist, the nearest one that does.

Tested by `tests/test_config.py`.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megavlm.config.checks import contradictions
from megavlm.config.document import foreign_values, parse_yaml, shown, shown_text
from megavlm.config.mistakes import describe_all, message_of
from megavlm.config.run import RunConfig
from megavlm.errors import ConfigError, MegavlmError
from megavlm.routing.config import PhaseConfig, RoutingConfig
from megavlm.system.files import RECIPES, find_resource, write_if_new
from megavlm.system.user_code import import_user_module


def load_config(recipe: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: Path of a YAML file, or the name of one that ships with megavlm.
        overrides: Dotted path → value; a string is read as YAML.

    Raises:
        ConfigError: With every mistake of the recipe and the overrides.
    """
    path = find_resource("recipes", str(recipe), ".yaml")
    tree = read_settings(path)
    for dotted, value in (overrides or {}).items():
        # a copy: later overrides may go into it
        _override(tree, dotted, deepcopy(read_value(dotted, value)))
    if foreign := [f"  {where or 'recipe'}: {what}" for where, what in foreign_values(tree)]:
        raise ConfigError(message_of(path, foreign))
    _import_modules(tree, path)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(message_of(path, describe_all(error, tree))) from error
    if lines := [f"  {where}: {what}" for where, what in contradictions(config)]:
        raise ConfigError(message_of(path, lines))
    return config


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ConfigError: If it is not YAML, or no mapping.
    """
    try:
        tree = parse_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {_in_short(error)}\n  do:    correct the file at the place named") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}\n  do:    check the path and its permissions") from error
    if tree is None:
        return {}  # what is missing is named, each with an example
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings\n  do:    write one with `megavlm init`, or start from a file in {RECIPES}")
    return tree


def read_value(name: str, value: Any) -> Any:
    """What was given for a setting on the command line; a string is read as YAML."""
    try:
        return parse_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: {shown(value)} is not YAML: {_in_short(error)}\n  do:    close what is open, and quote what has a colon"
        ) from error


def run_dir_of(recipe: str, overrides: dict[str, Any]) -> str | None:
    """The run folder that a recipe and its overrides name, however wrong the rest of them is; None if they name none."""
    try:
        tree = {} if "run_dir" in overrides else read_settings(find_resource("recipes", str(recipe), ".yaml"))
        run_dir = read_value("run_dir", overrides.get("run_dir", tree.get("run_dir")))
    except (MegavlmError, OSError, ValueError):
        return None
    return run_dir if isinstance(run_dir, str) and "\0" not in run_dir else None


def _import_modules(tree: dict, recipe: Path) -> None:
    """Import the modules that register policies, so that the recipe may name them."""
    routing = tree.get("routing")
    names = routing.get("modules") if isinstance(routing, dict) else None
    for name in names if isinstance(names, list) else []:
        try:
            import_user_module(str(name))
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(
                f"{recipe}: routing.modules: {name} cannot be imported: {type(error).__name__}: {error}\n"
                "  do:    give the path of a Python file, or a module that Python finds"
            ) from error
    if names:
        # the union of policies is part of the schema
        PhaseConfig.model_rebuild(force=True)
        RoutingConfig.model_rebuild(force=True)
        RunConfig.model_rebuild(force=True)


def _in_short(error: Exception) -> str:
    return shown_text(str(error), 1000)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as a recipe that ``load_config`` reads again."""
    write_if_new(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110))


def _override(tree: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    tree[leaf] = value
