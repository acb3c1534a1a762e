"""The help of commands, from their docstrings: usage, what it does, examples, options; 80 columns, one screen where that can be."""

import inspect
import re
import textwrap
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

WIDTH = 80
LINES = 24
END = " With --quiet: results and warnings only."
KINDS = {int: "N", float: "NUMBER", str: "TEXT"}


def help_of(commands: Any, path: list[str]) -> str:
    """The help of a command, or of a group of commands.

    Args:
        commands: The object whose methods, and whose attributes' methods, are the commands.
        path: Words that lead to it; empty for all of them.
    """
    found = commands
    for name in path:
        found = getattr(found, name.replace("-", "_"))
    words = " ".join(["megavlm", *path])
    return _of_command(words, found) if inspect.ismethod(found) else _of_group(words, found)


def names_in(group: Any) -> list[str]:
    """The commands and groups of a group, as they are typed."""
    return [name.replace("_", "-") for name in dir(group) if not name.startswith("_")]


def options_of(command: Callable) -> list[str]:
    """The options of a command, as they are typed."""
    parameters = inspect.signature(command).parameters.values()
    return [
        f"--{p.name.replace('_', '-')}"
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is not p.empty
    ]


def _of_group(words: str, group: Any) -> str:
    members = {name: getattr(group, name.replace("-", "_")) for name in names_in(group)}
    column = max(map(len, members)) + 4
    lines = [f"  {name:<{column - 2}}{_cut(_first_sentence(member), WIDTH - column)}" for name, member in members.items()]
    about = [_filled(part) for part in (inspect.getdoc(group) or "").split("\n\n")]
    # a screen: the list is what one looks for
    while len("\n\n".join(about).splitlines()) + len(lines) > 19 and len(about) > 1:
        about.pop()
    text = "\n\n".join(about)
    gap = [""] if len(text.splitlines()) + len(lines) + 3 <= LINES else []
    return "\n".join(
        [
            f"usage: {words} COMMAND …",
            text,
            *gap,
            *lines,
            f"{words} COMMAND --help says more.{END if words == 'megavlm' else ''}",
        ]
    )


def _of_command(words: str, command: Callable) -> str:
    about, _, arguments = (inspect.getdoc(command) or "").partition("\nArgs:\n")
    described = _described(arguments)
    needed, options = [], []
    for parameter in inspect.signature(command).parameters.values():
        text = described.get(parameter.name, "")
        if parameter.kind == parameter.VAR_KEYWORD:
            options.append(("--SETTING=VALUE", text))
        elif parameter.default is parameter.empty:
            needed.append((parameter.name.upper(), text))
        else:
            options.append((_option(parameter), _with_default(text, parameter.default)))
    usage = " ".join([f"usage: {words}", *(name for name, _ in needed), *(["[--OPTION=…]"] if options else [])])
    table = _table([*needed, *options])
    says, *more = (_filled(part) for part in about.strip().split("\n\n"))
    for parts in ([usage, says, *more], [usage, says, *(part for part in more if part.startswith("    "))]):
        text = "\n\n".join(part for part in (*parts, table) if part)
        if len(text.splitlines()) <= LINES:
            return text
    # the options are what one looks for
    return re.sub("\n\n+", "\n", text)


def _described(arguments: str) -> dict[str, str]:
    """Name → text, of the block ``Args:``."""
    entries = re.split(r"^ {4}(\w+): ", textwrap.indent(textwrap.dedent(arguments), "    "), flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2])}


def _option(parameter: inspect.Parameter) -> str:
    name = f"--{parameter.name.replace('_', '-')}"
    kind = _kind(parameter.annotation, parameter.default)
    return f"{name}={kind}" if kind else name


def _kind(annotation: Any, default: Any) -> str:
    """The kind of value in a word; nothing for a switch, and what turns it off for one that is on."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    if annotation is inspect.Parameter.empty:
        annotation = type(default)
    if annotation is bool:
        return "False" if default else ""
    return KINDS.get(annotation, "VALUE")


def _with_default(text: str, default: Any) -> str:
    if default in (None, "", False) or default == 0:
        return text
    shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    # the text of an option says what a long default is
    return f"{text} [{shown}]" if len(shown) <= 24 else text


def _table(rows: list[tuple[str, str]]) -> str:
    column = min(26, max((len(name) for name, _ in rows), default=0) + 4)
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, WIDTH - column) or [""]
        first = f"  {name:<{column - 2}}{wrapped[0]}" if len(name) <= column - 4 else f"  {name}\n{' ' * column}{wrapped[0]}"
        lines += [first.rstrip(), *(" " * column + line for line in wrapped[1:])]
    return "\n".join(lines)


def _filled(part: str) -> str:
    """A paragraph in lines of 80; an example stays as it is, but for lines that are too long."""
    if not part.startswith("    "):
        return textwrap.fill(" ".join(part.split()), WIDTH, break_on_hyphens=False)
    return "\n".join(_example(line.strip()) for line in part.splitlines())


def _example(line: str) -> str:
    """A command, continued on further lines where it is too long: before options, and else at blanks."""
    wrap = textwrap.TextWrapper(WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    lines = [""]
    for words in re.split(r" (?=--)", line) if len(line) > WIDTH - 4 else [line]:
        if len(lines[-1]) + len(words) < WIDTH - 10 or len(line) <= WIDTH - 4:
            lines[-1] = f"{lines[-1]} {words}".strip()
        else:
            lines = [text for text in [*lines, *wrap.wrap(words)] if text]
    return "    " + " \\\n        ".join(lines)


def _first_sentence(member: Any) -> str:
    text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;:]) ", text)[0].rstrip(".;:")


def _cut(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
