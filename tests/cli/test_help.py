"""Help, completion, and what is said at the end: fast, readable, on a screen."""

import inspect
import shutil
import subprocess
import sys

import pytest

from megavlm.cli import main as cli
from megavlm.cli.arguments import Positive, asks_for_help
from megavlm.cli.completion import completion_script
from megavlm.cli.help import help_of, names_in, options_of
from megavlm.cli.interrupted import KEPT, NOTHING, what_is_kept
from megavlm.errors import ConfigError

HEAVY = ("torch", "numpy", "transformers", "deepspeed", "pydantic", "matplotlib", "scipy", "sklearn", "rich.console")
COMMANDS = cli.Commands()


def paths(group=COMMANDS, path=()):
    """Words of every group and command."""
    yield [*path]
    for name in names_in(group):
        member = getattr(group, name.replace("-", "_"))
        if inspect.ismethod(member):
            yield [*path, name]
        else:
            yield from paths(member, [*path, name])


def command(path):
    found = COMMANDS
    for name in path:
        found = getattr(found, name.replace("-", "_"))
    return found


class Example:
    def draw(self, run: str, num: Positive = 3, heat: float = 1.0, title: str | None = None, dry_run: bool = False, **overrides):
        """Draw something. Slowly.

            megavlm draw runs/mine

        Args:
            run: The run folder,
                or one checkpoint in it.
            num: How many.
            heat: How wild.
            title: Above it.
            dry_run: Only say so.
            overrides: Settings to change.
        """


def test_help_reads_well():
    assert help_of(Example(), ["draw"]).splitlines() == [
        "usage: megavlm draw RUN [--OPTION=…]",
        "",
        "Draw something. Slowly.",
        "",
        "    megavlm draw runs/mine",
        "",
        "  RUN              The run folder, or one checkpoint in it.",
        "  --num=N          How many. [3]",
        "  --heat=NUMBER    How wild. [1.0]",
        "  --title=TEXT     Above it.",
        "  --dry-run        Only say so.",
        "  --SETTING=VALUE  Settings to change.",
    ]
    assert "  draw  Draw something" in help_of(Example(), [])
    assert not any("…" in line for group in ([], ["data"], ["analyze"]) for line in help_of(COMMANDS, group).splitlines()[1:-1])


@pytest.mark.parametrize("path", paths(), ids=" ".join)
def test_every_help_fits_a_screen(path):
    lines = help_of(COMMANDS, path).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert not any(word in text for word in ("Positive", "NotNegative", "Annotated", "POSITIONAL", "Optional", "--overrides"))
    for option in options_of(command(path)) if inspect.ismethod(command(path)) else ():
        assert f"  {option}" in text, "described"


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("data lint a.tar --help", ["data", "lint"]),
        ("data --help lint", ["data"]),
        ("--help", []),
        ("", []),
        ("data", ["data"]),
        ("data lint -h", ["data", "lint"]),
        ("train digits", None),
        ("data lint", None),
        ("nothing-like-it", None),
    ],
)
def test_what_asks_for_help(line, path):
    assert asks_for_help(COMMANDS, line.split()) == path


@pytest.mark.parametrize("line", ["--version", "--help", "data lint --help", "completion bash"])
def test_what_answers_at_once_imports_nothing_heavy(line):
    code = (
        f"import sys; sys.argv = ['megavlm', *{line.split()!r}]\n"
        "from megavlm.cli.main import main\nmain()\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []" and len(done.stdout) > 20 and not done.stderr


def test_lint_needs_no_torch(digits_folder):
    code = (
        f"import sys; sys.argv = ['megavlm', 'data', 'lint', {str(digits_folder / 'generation-test-00.tar')!r}]\n"
        "from megavlm.cli.main import main\nmain()\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'matplotlib', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["360 samples, 0 problems", "[]"]


def test_tables_fit_80_columns(digits_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    shards = f"{digits_folder}/{{understanding,generation}}-train-{{00..01}}.tar"
    monkeypatch.setattr(sys, "argv", ["megavlm", "data", "inspect", shards, "--out", str(tmp_path / "sheet.png")])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 6 and max(map(len, lines[:-1])) <= 80


def complete(shell: str, typed: str) -> list[str]:
    """What a real shell offers after what was typed; the last word may be begun."""
    script = completion_script(COMMANDS, shell)
    if shell == "fish":
        program = ["fish", "--no-config", "-c", f"{script}\ncomplete -C 'megavlm {typed}'"]
        return [line.split("\t")[0] for line in subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()]
    words = ["megavlm", *typed.split(" ")]
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f'{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _megavlm; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shells_complete_commands_and_options(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    assert complete(shell, "tr") == ["train"]
    assert set(complete(shell, "data ")) >= {"lint", "build", "image-tokenizer"} and "train" not in complete(shell, "data ")
    assert {"--format", "--recipe", "--help"} <= set(complete(shell, "data lint a.tar --"))
    assert complete(shell, "judge vqa r q --templ") == ["--template"]


def test_zsh_reads_its_script(tmp_path):
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    script = tmp_path / "script"
    script.write_text(completion_script(COMMANDS, "zsh") + "\nprint -r -- $_comps[megavlm]\n")
    done = subprocess.run(["zsh", "-f", script], capture_output=True, text=True, check=True, env={"HOME": str(tmp_path)})
    assert "_megavlm" in done.stdout and not done.stderr


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match="give one of bash, zsh, fish"):
        completion_script(COMMANDS, "tcsh")


def test_ctrl_c_says_what_is_kept():
    known = {" ".join(path) for path in paths()}
    assert set(KEPT) <= known
    assert "arms that are done stay" in what_is_kept(["study", "digits", "--parallel", "2"])
    assert "RUN/judged/" in what_is_kept(["judge", "vqa", "runs/mine"])
    assert what_is_kept(["evaluate", "runs/mine"]) == NOTHING
