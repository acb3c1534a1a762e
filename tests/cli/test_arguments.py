"""What fire would notice too late is refused before a command runs."""

import fire
import pytest

from megavlm.cli.arguments import Positive, check_arguments
from megavlm.errors import ConfigError


class Group:
    def remove(self, run: str, keep: int | None = None, dry_run: bool = False): ...
    def draw(self, run: str, num: Positive = 3, heat: float = 1.0): ...


class Commands:
    def __init__(self):
        self.group = Group()

    def train(self, recipe: str, **overrides): ...


@pytest.mark.parametrize(
    "line",
    [
        "group remove runs/a --keep=3 --dry-run",
        "group remove runs/a 3",
        "group remove --run runs/a --keep 3 --nodry_run",
        "group remove runs/a --keep=None",
        "group draw runs/a --num=1 --heat=-0.5",
        "train digits --optimizer.num_steps=3 --seed 1",
        "group",
        "",
    ],
)
def test_what_fits_is_passed_on(line):
    assert check_arguments(Commands(), line.split()) == line.split()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("group remove runs/a --dryrun", "no option --dryrun. Did you mean --dry_run"),
        ("group remove runs/a 3 True more", "'more' is one value too many"),
        ("train digits twice", "'twice' is one value too many"),
        ("group remove runs/a --keep=all", "keep is a number, not all"),
        ("group remove runs/a all", "keep is a number, not all"),
        ("group remove runs/a --keep", "keep is a number, not nothing"),
        ("group draw runs/a --num=0", "num is at least 1, not 0"),
        ("group draw runs/a --num=1.5", "num is a whole number, not 1.5"),
        ("group draw runs/a --num=1e3", "num is a whole number, not 1e3"),
        ("group draw runs/a --heat=True", "heat is a number, not True"),
        ("group draw runs/a --num=None", "num is a number, not None"),
    ],
)
def test_what_does_not_is_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(Commands(), line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian digits", "there is no command trian. Did you mean train"),
        ("group remov runs/a", "there is no command group remov. Did you mean remove"),
        ("--trian", "Did you mean train"),
        ("nothing-like-it", "give one of group, train"),
        ("group remove runs/a --dry-run=maybe", "dry_run is True or False, not maybe"),
        ("group remove --dry-run runs/a", "dry_run is True or False, not runs/a"),
    ],
)
def test_misspelt_commands_and_switches(line, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(Commands(), line.split())


@pytest.mark.parametrize("name", ["2024", "1e3", "a,b", "[a]", "{a: 1}", "True", "0x10", "'a'", "1_000", "(1)"])
@pytest.mark.parametrize("form", ["group remove {} --keep=3", "group remove --run={} --keep 3", "group remove --keep 3 --run {}"])
def test_names_reach_the_command_as_they_were_typed(name, form):
    seen = []

    class Asked:
        def __init__(self):
            self.group = self

        def remove(self, run: str, keep: int | None = None):
            seen.append((run, keep))

    line = [word.replace("{}", name) for word in form.split()]
    fire.Fire(Asked(), check_arguments(Asked(), line), name="megavlm")
    assert seen == [(name, 3)]
