"""The words for what is wrong with a recipe: the path, the value, and the nearest name that exists."""

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from megavlm.config.run import RunConfig
from megavlm.routing.policies import POLICIES, Policy
from megavlm.settings import Settings


def describe(mistake: dict, tree: Any) -> str:
    parts = []
    for i, part in enumerate(mistake["loc"]):
        # pydantic names the chosen member of a union in the path; the user did not write it
        if isinstance(tree, dict) and part not in tree and i + 1 < len(mistake["loc"]):
            continue
        parts.append(str(part))
        tree = tree.get(part) if isinstance(tree, dict) else None
    path, value = ".".join(parts), mistake["input"]
    if mistake["type"] == "extra_forbidden":
        return f"  {path}: there is no such setting (value {value!r}). Did you mean {nearest_path(path)}?"
    if mistake["type"] == "missing":
        return f"  {path}: is missing and has no default"
    if mistake["type"] == "union_tag_invalid":
        tags = mistake["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(str(mistake["ctx"]["tag"]), tags, n=1, cutoff=0)[0]
        discriminator = mistake["ctx"]["discriminator"].strip("'")
        return f"  {path}.{discriminator}: there is no {mistake['ctx']['tag']!r}. Did you mean {near}? There are {', '.join(tags)}."
    return f"  {path}: {mistake['msg']} (value {value!r})"


def nearest_path(path: str) -> str:
    """The existing setting that looks most like ``path``, by its whole path and by its last name."""
    given = path.split(".")

    def likeness(known: str) -> float:
        leaf = known.rsplit(".", maxsplit=1)[-1]
        whole = difflib.SequenceMatcher(None, known, path).ratio()
        return whole + difflib.SequenceMatcher(None, leaf, given[-1]).ratio() + (given[-1] in leaf.split("_"))

    known_paths = [
        # the names inside a mapping are the user's own: take them over
        ".".join(given[i] if part == "*" and i < len(given) else part for i, part in enumerate(known.split(".")))
        for known in _all_paths(RunConfig)
    ]
    return max((known for known in known_paths if not path.startswith(known + ".")), key=likeness)


def _all_paths(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings below a Config class; ``*`` stands for the names of a mapping."""
    if get_origin(annotation) is dict:
        yield from _all_paths(get_args(annotation)[1], f"{prefix}*.")
    elif annotation is Policy:
        for policy in POLICIES.values():
            yield from _all_paths(policy, prefix)
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _all_paths(member, prefix)
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            yield from _all_paths(field.annotation, f"{prefix}{name}.")
