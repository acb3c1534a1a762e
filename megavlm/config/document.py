"""YAML as recipes are written: its plain values only, read the way people mean them.

Beside YAML 1.1, which the parser knows: ``1e-3`` is a number, ``010`` and ``1:30`` and ``2026-01-01`` are text, a name twice in one mapping
is a mistake. Strings, numbers, booleans, null, lists and mappings with names is all that a recipe may hold.

Tested by `tests/test_config.py`.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MOST_VALUES = 3_000_000
"""A recipe with more is none: aliases can unfold to any number of values."""
DEEPEST = 50
LONGEST_SHOWN = 80


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, without dates, and without names that come twice."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: If it is none, whatever the parser meant to say.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError, KeyError) as error:
        # tags such as !!int on what is none
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def shown(value: Any) -> str:
    """A value for a message: short, and printable everywhere."""
    return shown_text(_repr(value), LONGEST_SHOWN)


def shown_text(text: str, longest: int) -> str:
    """The text, its middle left out where it is longer, with nothing that cannot be printed."""
    if len(text) > longest:
        text = f"{text[: longest - 20]} … {text[-15:]}"
    return text.encode(errors="backslashreplace").decode()


def foreign_values(tree: Any) -> Iterator[tuple[str, str]]:
    """(dotted path, what is wrong) of everything that no recipe may hold."""
    stack, count = [("", tree, 0)], 0
    while stack:
        path, value, depth = stack.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            yield path[:LONGEST_SHOWN], "the recipe is nested too deep, or unfolds to too many values; write it without aliases"
            return
        if isinstance(value, dict):
            stack += [(f"{path}.{name}".lstrip("."), item, depth + 1) for name, item in value.items()]
            for name in value:
                if problem := _name_problem(name):
                    yield f"{path}.{shown(name)}".lstrip("."), problem
        elif isinstance(value, (list, tuple)):
            stack += [(f"{path}.{number}", item, depth + 1) for number, item in enumerate(value)]
        elif problem := _problem(value):
            yield path, f"{problem} (value {shown(value)})"


def _name_problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return f"a name is a {type(name).__name__}; quote it"
    return "a name is unprintable; correct it" if not name.isprintable() or not name else None


def _problem(value: Any) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "text holds a NUL; remove it"
        return "text holds half a character (a lone surrogate); remove it" if re.search("[\ud800-\udfff]", value) else None
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return None
    if isinstance(value, int):
        return "a number beyond 64 bits; give a smaller one" if abs(value) >= 2**63 else None
    return f"a {type(value).__name__} is no value of a recipe; quote it, or write a number, text, list or mapping"


def _repr(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list in itself
        return f"a very large {type(value).__name__}"
    return text if text.isprintable() else ascii(text)
