"""What fire would notice too late is refused before a command runs."""

import pytest

from megavlm.arguments import check_arguments
from megavlm.errors import ConfigError


class Group:
    def remove(self, run: str, keep: int | None = None, dry_run: bool = False): ...


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
        ("group remove runs/a --keep=all", "keep is a number, not 'all'"),
        ("group remove runs/a all", "keep is a number, not 'all'"),
    ],
)
def test_what_does_not_is_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(Commands(), line.split())


@pytest.mark.parametrize("line", ["group remove runs/a --help", "group --help remove", "--help"])
def test_help_anywhere_is_only_help(line):
    arguments = check_arguments(Commands(), line.split())
    assert arguments[-2:] == ["--", "--help"] and "runs/a" not in arguments
