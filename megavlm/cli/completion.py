"""The script that lets a shell complete commands and options. It is a table: no process of ours runs while one types.

Tested by `tests/cli/test_help.py`.
"""

import inspect
from typing import Any

from megavlm.cli.help import names_in, options_of
from megavlm.errors import ConfigError

BASH = """_megavlm() {{
    local words
    case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _megavlm megavlm"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = """function __megavlm_words
    switch (string join ' ' -- (commandline -opc)[2..-1])' '
{cases}
    end
end
complete -c megavlm -a '(__megavlm_words)'"""


def completion_script(commands: Any, shell: str) -> str:
    """The script for a shell.

    Raises:
        ConfigError: If there is none for it.
    """
    table = _table(commands, "")
    if shell == "fish":
        return FISH.format(cases="\n".join(f"    case '{path}*'\n        printf '%s\\n' {words}" for path, words in table))
    if shell not in ("bash", "zsh"):
        raise ConfigError(f"there is no completion for {shell}\n  do:    give one of bash, zsh, fish")
    cases = "\n".join(f"""    "{path}"*) words="{words}" ;;""" for path, words in table)
    return (BASH if shell == "bash" else ZSH).format(cases=cases)


def _table(group: Any, path: str) -> list[tuple[str, str]]:
    """(What has been typed, what may follow), the longest first."""
    rows = []
    for name in names_in(group):
        member = getattr(group, name.replace("-", "_"))
        typed = f"{path}{name} "
        rows += [(typed, " ".join([*options_of(member), "--help"]))] if inspect.ismethod(member) else _table(member, typed)
    return [*rows, (path, " ".join(names_in(group)))]
