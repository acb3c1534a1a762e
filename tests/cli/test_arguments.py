"""What fire would notice too late is refused before a command runs."""

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


@pytest.mark.parametrize("line", ["group remove runs/a --help", "group --help remove", "--help"])
def test_help_anywhere_is_only_help(line):
    arguments = check_arguments(Commands(), line.split())
    assert arguments[-2:] == ["--", "--help"] and "runs/a" not in arguments
