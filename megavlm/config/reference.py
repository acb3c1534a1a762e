"""Every setting with its kind of value, default, unit and meaning, from the schema: for `megavlm recipe show` and docs/settings.md.

Tested by `tests/config/test_reference.py`.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from megavlm.config.run import RunConfig
from megavlm.config.timeline import timeline
from megavlm.routing.policies import POLICIES, Policy
from megavlm.settings import MOST, Settings

UNITS = {
    "s": "seconds",
    "steps": "steps",
    "tokens": "tokens",
    "rows": "rows",
    "samples": "samples",
    "packs": "packs",
    "gib": "GiB",
    "ratio": "share, 0 to 1",
    "fraction": "share of the steps",
    "layer": "layer",
    "layers": "layers",
}
"""Last word of a setting's name -> its unit."""
UNIT_OF = {"num_lanes": "packs per step", "height": "codes", "width": "codes", "fill": "share, 0 to 1", "min_lr_ratio": "share of the peak"}
"""Settings whose names end otherwise."""

POLICY_OF = "routing.understanding."


@dataclass(frozen=True)
class Described:
    """One setting."""

    path: str
    """Dotted; ``*`` stands for a name of the user's own."""
    kind: str
    """Which values it takes."""
    default: str
    """As YAML; empty if it has none."""
    unit: str
    meaning: str


@dataclass(frozen=True)
class Block:
    """Settings that stand together in a recipe."""

    title: str
    meaning: str
    settings: list[Described]


def blocks(root: type[Settings] = RunConfig, prefix: str = "") -> Iterator[Block]:
    """The settings of a class, and those of the classes in it, each once."""
    names, inner = [], []
    for name, field in root.model_fields.items():
        children = list(_classes(field.annotation, f"{prefix}{name}."))
        inner += children
        # of a block without another value its own settings say everything
        if children and not _has_plain_value(field.annotation):
            continue
        default = "" if field.default is PydanticUndefined else _shown(field.get_default(call_default_factory=True))
        kind = _kind(field.annotation, field.metadata)
        names.append(Described(prefix + name, kind, default, _unit(name), _meaning(root, name)))
    yield Block(prefix.rstrip("."), _text((root.__doc__ or "").split("\n\n")[0]), names)
    for title, member in inner:
        for block in blocks(member, title):
            is_choice = block.title == title.rstrip(".") and {"policy", "kind"} & set(member.model_fields)
            yield replace(block, title=f"{block.title}: {_choice(member)}") if is_choice else block


def _choice(member: type[Settings]) -> str:
    """The name by which a recipe chooses a class among others."""
    name = "policy" if "policy" in member.model_fields else "kind"
    return f"`{name}: {', '.join(get_args(member.model_fields[name].annotation))}`"


def _classes(annotation: Any, prefix: str) -> Iterator[tuple[str, type[Settings]]]:
    """The classes of settings that a value may be, each with its prefix."""
    if get_origin(annotation) in (dict, list):
        yield from _classes(get_args(annotation)[-1], f"{prefix}*.")
    elif annotation is Policy:
        # the same for both tasks and in all phases: said once
        yield from ((prefix, policy) for policy in POLICIES.values() if policy.__module__.startswith("megavlm.") and prefix == POLICY_OF)
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        yield prefix, annotation
    elif get_origin(annotation) in (Union, UnionType) or hasattr(annotation, "__metadata__"):
        for member in get_args(annotation):
            yield from _classes(member, prefix)


def _has_plain_value(annotation: Any) -> bool:
    return NoneType in get_args(annotation)


def _kind(annotation: Any, limits: list[Any]) -> str:
    """The values that an annotation takes, in words.

    Args:
        annotation: A type.
        limits: What `Annotated` says beside it.
    """
    origin, members = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _kind(members[0], [*limits, *annotation.__metadata__])
    if origin is Literal:
        return ", ".join(map(str, members))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys("none" if each is NoneType else _kind(each, limits) for each in members))
    if origin in (list, tuple):
        return f"list of {_kind(members[0], [])}"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return words[annotation] + _limits(limits) if annotation in words else "mapping"


def _limits(limits: list[Any]) -> str:
    flat = [part for limit in limits for part in (getattr(limit, "metadata", None) or [limit])]
    found = {name: value for part in flat for name in ("ge", "gt", "le", "lt") if (value := getattr(part, name, None)) is not None}
    lower = f"from {found['ge']:g}" if "ge" in found else f"above {found['gt']:g}" if "gt" in found else ""
    upper = f"to {found['le']:g}" if found.get("le", MOST) != MOST else f"below {found['lt']:g}" if "lt" in found else ""
    return f", {f'{lower} {upper}'.strip()}" if lower or upper else ""


def _unit(name: str) -> str:
    return UNIT_OF.get(name) or UNITS.get(name.rsplit("_", 1)[-1], "")


def _shown(value: Any) -> str:
    if isinstance(value, Settings):
        value = value.model_dump(mode="json")
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _meaning(owner: type[Settings], name: str) -> str:
    """What a class says of a setting, or else the class that it is derived from."""
    classes = (each for each in owner.__mro__ if issubclass(each, Settings) and name in each.model_fields)
    return next((_text(meaning) for each in classes if (meaning := each.model_fields[name].description)), "")


def _text(meaning: str | None) -> str:
    return " ".join((meaning or "").split())


def describe(config: RunConfig) -> list[str]:
    """Lines that say every setting of a recipe with its value, default, unit and meaning, and then the phases of its run."""
    known = {(block.title, setting.path): setting for block in blocks() for setting in block.settings}
    lines = []
    for path, value in _flat(config.model_dump(mode="json")):
        found = [setting for (title, name), setting in known.items() if _fits(path, name, title, config)]
        if not found:
            continue
        default = f"default {found[0].default}" if found[0].default else "no default"
        remark = ", ".join(part for part in (found[0].unit, default) if part)
        lines += [f"{path}: {_shown(value)}  ({remark})", *(f"    {line}" for line in textwrap.wrap(found[0].meaning, 110))]
    return [*lines, "", *timeline(config)]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, dict) and value and f"{prefix}{name}" not in ("model.architecture", "loss.task_weights", "data.mixture"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fits(path: str, name: str, title: str, config: RunConfig) -> bool:
    """Whether a setting of the schema is the one at a path of a recipe: of the class that the recipe chose."""
    given = re.sub(r"^routing\.(phases\.\d+\.)?(understanding|generation)\.", POLICY_OF, path).split(".")
    pattern = name.split(".")
    if len(given) != len(pattern) or any(one not in (other, "*") for one, other in zip(pattern, given, strict=True)):
        return False
    if ": `" not in title:
        return True
    chosen: Any = config
    for part in path.split(".")[:-1]:
        chosen = chosen[int(part)] if isinstance(chosen, list) else getattr(chosen, part)
    return title.endswith(f": {_choice(type(chosen))}")


def page() -> str:
    """docs/settings.md."""
    lines = [
        "# Every setting of a recipe",
        "",
        "`python tools/settings_page.py` writes this page from the schema; a test compares them. `megavlm recipe show RECIPE` prints",
        "the same with the values of a recipe. Settings without a default must be given. `*` stands for a name of your own.",
        "`routing.generation` and every phase take the same policies as `routing.understanding`.",
        "[How values are read](recipes.md) is another page.",
    ]
    for block in blocks():
        lines += ["", f"## {block.title or 'At the top'}", "", *([block.meaning, ""] if block.meaning else [])]
        if block.settings:
            lines += ["| setting | values | default | unit | meaning |", "|---|---|---|---|---|"]
        for setting in block.settings:
            default = f"`{setting.default}`" if setting.default else "must be given"
            row = (f"`{setting.path}`", setting.kind, default, setting.unit, setting.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines) + "\n"
