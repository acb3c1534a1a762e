"""Looks over a command line before fire runs it: fire itself notices what it cannot use only after the command has done its work, and reads
names such as 2024, 1e3 or a,b as numbers and tuples."""

import ast
import difflib
import inspect
from itertools import chain, repeat
from types import NoneType
from typing import Annotated, Any, get_args

from megavlm.errors import ConfigError

Positive = Annotated[int, 1]
"""A whole number; the second argument is the least that is taken."""
NotNegative = Annotated[int, 0]


def check_arguments(commands: Any, arguments: list[str]) -> list[str]:
    """The arguments for fire, text quoted where it would read something else.

    Args:
        commands: The object whose methods, and whose attributes' methods, are the commands.
        arguments: As typed, without the program.

    Raises:
        ConfigError: If there is no such command, if it takes no such flag or no so many values, or if a number is none.
    """
    command, path = _find(commands, arguments)
    rest = arguments[len(path) :]
    if not inspect.ismethod(command):
        if rest and rest[0] != "--":
            raise ConfigError(_no_command(path, command, rest[0]))
        return arguments
    _check(" ".join(path), command, rest)
    return [*path, *_verbatim(command, rest)]


def asks_for_help(commands: Any, arguments: list[str]) -> list[str] | None:
    """The words of the command, or group, whose help is wanted: ``--help`` may stand anywhere, and a group alone asks for it."""
    command, path = _find(commands, arguments)
    wanted = bool({"--help", "-h"} & set(arguments)) or (path == arguments and not inspect.ismethod(command))
    return path if wanted else None


def _find(commands: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """The command, or the group, that the first words name, and those words."""
    command, path = commands, []
    for name in arguments:
        found = getattr(command, name.replace("-", "_"), None) if name[:1] not in "-_" else None
        if found is None or inspect.ismethod(command):
            break
        command, path = found, [*path, name]
    return command, path


def _no_command(path: list[str], group: Any, given: str) -> str:
    known = [name for name in dir(group) if not name.startswith("_")]
    near = difflib.get_close_matches(given.lstrip("-").replace("-", "_"), known, 1)
    return (
        f"there is no command {' '.join([*path, given])}{f'. Did you mean {near[0]}?' if near else ''}\n"
        f"  do:    give one of {', '.join(known)}; see {' '.join(['megavlm', *path, '--help'])}"
    )


def _verbatim(command: Any, arguments: list[str]) -> list[str]:
    """The arguments, those quoted that are text to the command and something else to fire."""
    parameters = inspect.signature(command).parameters
    texts = {name for name, parameter in parameters.items() if parameter.annotation in (str, str | None)}
    flags = _split(arguments)[1]
    # a parameter such as *words takes all that is left
    places = chain.from_iterable(
        repeat(name) if parameter.kind == parameter.VAR_POSITIONAL else [name]
        for name, parameter in parameters.items()
        if name not in flags
    )
    result, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        if not word.startswith("--"):
            result.append(_quoted(word) if next(places, None) in texts else word)
            continue
        flag, equals, value = word.partition("=")
        is_text = flag[2:].replace("-", "_") in texts
        if equals:
            result.append(f"{flag}={_quoted(value)}" if is_text else word)
            continue
        result.append(word)
        if rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            result.append(_quoted(value) if is_text else value)
    return result


def _quoted(text: str) -> str:
    from fire.parser import DefaultParseValue

    return text if text == "None" or DefaultParseValue(text) == text else repr(text)


def _check(name: str, command: Any, arguments: list[str]) -> None:
    parameters = inspect.signature(command).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    takes_words = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    values, flags = _split(arguments)
    for flag in flags:
        if flag not in named and flag.removeprefix("no") not in named and not takes_all:
            near = difflib.get_close_matches(flag, named, 1)
            raise ConfigError(
                f"{name}: there is no option --{flag}{f'. Did you mean --{near[0]}?' if near else ''}\n  do:    see megavlm {name} --help"
            )
    places = [n for n, parameter in named.items() if n not in flags and parameter.kind != parameter.KEYWORD_ONLY]
    if len(values) > len(places) and not takes_words:
        raise ConfigError(
            f"{name}: {values[len(places)]!r} is one value too many\n  do:    quote what has spaces; see megavlm {name} --help"
        )
    for place, value in [*zip(places, values), *flags.items()]:
        kind = _misfit(named[place].annotation, value) if place in named else None
        if kind:
            raise ConfigError(f"{name}: {place} is {kind}, not {value or 'nothing'}\n  do:    see megavlm {name} --help")


def _split(arguments: list[str]) -> tuple[list[str], dict[str, str | None]]:
    """Values by place, and flags with their values; a flag takes the next word, as fire has it, unless that is a flag."""
    values, flags, rest = [], {}, arguments[: arguments.index("--")] if "--" in arguments else list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            values.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else None
        flags[flag.replace("-", "_")] = value
    return values, flags


def _misfit(annotation: Any, text: str | None) -> str | None:
    """What a number should be, if the text is none of that kind."""
    kinds = {annotation, *get_args(annotation)}
    if bool in kinds:
        return None if text in (None, "True", "False") else "True or False"
    if not kinds & {int, float} or (text == "None" and NoneType in kinds):
        return None
    try:
        number = ast.literal_eval(text or "")  # as fire reads it: 1e3 is no whole number to it
    except (ValueError, SyntaxError):
        return "a number"
    if type(number) not in (int, float):
        return "a number"
    if float not in kinds and type(number) is float:
        return "a whole number"
    least = getattr(annotation, "__metadata__", (number,))[0]
    return f"at least {least}" if number < least else None
