"""The words for what is wrong with a recipe: the path, the value, and the nearest name that exists. Tested by `tests/test_config.py`."""

import difflib
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from megavlm.config.document import LONGEST_SHOWN, shown, shown_text
from megavlm.config.run import RunConfig
from megavlm.config.words import EXAMPLES, SOUGHT
from megavlm.routing.policies import POLICIES, Policy
from megavlm.settings import Settings

LONGEST_SAID = 600
MOST_SHOWN = 30
"""Mistakes that a message lists."""


def message_of(source: Any, lines: list[str]) -> str:
    """The message for mistakes of a file, one per line."""
    left_out = [f"  … and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
    head = f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}"
    return "\n".join([head, *lines[:MOST_SHOWN], *left_out, "  do:    correct what is named, in the recipe or on the command line"])


def describe_all(error: ValidationError, tree: Any, root: type[Settings] = RunConfig) -> list[str]:
    """The mistakes that pydantic found in ``tree``, the settings of a ``root``, one line each."""
    found = [_describe(mistake, tree, root) for mistake in error.errors()]
    # of the alternatives of a setting the one that came further says what is wrong
    lines = [line for path, line in found if not any(other.startswith(path + ".") for other, _ in found)]
    return [f"  {line}" for line in dict.fromkeys(lines)]


def _describe(mistake: Mapping[str, Any], tree: Any, root: type[Settings]) -> tuple[str, str]:
    """Dotted path, and the line."""
    parts = []
    for i, part in enumerate(mistake["loc"]):
        # pydantic names the chosen member of a union in the path; the user did not write it
        is_members = part not in tree if isinstance(tree, dict) else not isinstance(part, int)
        if is_members and (i + 1 < len(mistake["loc"]) or not isinstance(tree, dict)):
            continue
        parts.append(shown_text(str(part), LONGEST_SHOWN))
        is_there = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        tree = tree[part] if is_there else None
    path, value = ".".join(parts), mistake["input"]
    if mistake["type"] == "extra_forbidden":
        near = nearest_path(path, root)
        guess = f"Did you mean {near}?" if near != path else f"Another kind of {'.'.join(parts[:-1])} has it, the one chosen here has not."
        instead = SOUGHT.get(parts[-1]) or guess
        return path, f"{path}: there is no such setting (value {shown(value)}). {instead[0].upper()}{instead[1:]}"
    if mistake["type"] == "missing":
        example = f", for example {EXAMPLES[path]}" if root is RunConfig and path in EXAMPLES else ""
        return path, f"{path}: is missing and has no default{example}"
    if mistake["type"] == "union_tag_invalid":
        tags = mistake["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(str(mistake["ctx"]["tag"]), tags, n=1, cutoff=0)[0]
        discriminator = mistake["ctx"]["discriminator"].strip("'")
        line = f"{path}.{discriminator}: there is no {shown(mistake['ctx']['tag'])}. Did you mean {near}? There are {', '.join(tags)}."
        return path, line
    return path, f"{path}: {shown_text(mistake['msg'].removeprefix('Value error, '), LONGEST_SAID)} (value {shown(value)})"


def nearest_path(path: str, root: type[Settings] = RunConfig) -> str:
    """The existing setting that looks most like ``path``, by its whole path and by its last name."""
    given = path.split(".")

    def likeness(known: str) -> float:
        leaf = known.rsplit(".", maxsplit=1)[-1]
        whole = difflib.SequenceMatcher(None, known, path).ratio()
        return whole + difflib.SequenceMatcher(None, leaf, given[-1]).ratio() + (given[-1] in leaf.split("_"))

    known_paths = [
        # the names inside a mapping are the user's own: take them over
        ".".join(given[i] if part == "*" and i < len(given) else part for i, part in enumerate(known.split(".")))
        for known in all_paths(root)
    ]
    return max((known for known in known_paths if not path.startswith(known + ".")), key=likeness)


def all_paths(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings below a Config class; ``*`` stands for the names of a mapping."""
    if get_origin(annotation) in (dict, list):
        yield from all_paths(get_args(annotation)[-1], f"{prefix}*.")
    elif annotation is Policy:
        for policy in POLICIES.values():
            yield from all_paths(policy, prefix)
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from all_paths(member, prefix)
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            yield from all_paths(field.annotation, f"{prefix}{name}.")
