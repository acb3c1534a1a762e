"""What is tried on a damaged run folder. Functions here are called in other processes, by name."""

import builtins
import errno
import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from megavlm.config import RunConfig, save_config
from megavlm.errors import MegavlmError
from megavlm.launch import train as launch
from megavlm.parts.trained import load_trained
from megavlm.runs import checkpoints
from megavlm.runs.retention import CheckpointConfig
from megavlm.runs.status import describe_status
from megavlm.system import world as distributed
from tests.distributed.work import weights
from tests.fuzz.harness import is_documented

_OPEN = io.open
KINDS = (
    *("cut", "empty", "garbage", "flip", "other", "zeros", "deep", "list", "deleted"),
    *("folder", "loop", "dangling", "pipe", "unreadable", "renamed"),
)


def train_to_the_end(config: RunConfig) -> str:
    """What `megavlm train` does with a recipe, in this process; a digest of all weights and moments that come out."""
    trainers = []
    make_trainer = launch.make_trainer
    launch.make_trainer = lambda *args: trainers.append(make_trainer(*args)) or trainers[-1]
    launch._end_at_once = _raise
    distributed.stop = lambda: None
    recipe = Path(config.run_dir).with_suffix(".yaml")
    save_config(config, recipe)
    launch.train(str(recipe), {})
    digest = hashlib.sha256()
    for name, value in sorted(weights(trainers[0].engine).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _raise(code: int) -> None:
    raise AssertionError(f"the process ended with status {int(code)}")


def try_folder(whole: Path, config: RunConfig, expected: str, damages: list[tuple[str, str]], seed: int) -> str:
    """Damage a copy of a run folder, ask every command about it, and go on with the run.

    Raises:
        MegavlmError: If the run is refused.
        AssertionError: If what comes out differs from the run that nobody damaged, or the exit status from what happened.
    """
    for name in set(os.environ) - set(distributed.without_place(os.environ)):
        del os.environ[name]  # each run of a fork finds a port of its own
    run = Path(config.run_dir)
    shutil.copytree(whole, run, symlinks=True)
    for kind, name in damages:
        damage(run, kind, name, random.Random(seed))
    newest = run / "checkpoints" / "step-00000004"
    for command in (
        lambda: describe_status(run),
        lambda: checkpoints.table(run),
        lambda: checkpoints.verify_all(run),
        lambda: checkpoints.verify_all(newest),
        lambda: checkpoints.prune(run, CheckpointConfig(keep_last=1, keep_best=1, best_metric="loss/generation"), dry_run=True),
        lambda: load_trained(run),
        lambda: load_trained(newest),
    ):
        answer(command)
    try:
        digest = train_to_the_end(config)
    except MegavlmError:
        _read_again()
        assert not run.is_dir() or (run / "exit_code").read_text() == "2\n", "a refused start says so"
        raise
    _read_again()
    assert digest == expected, "the run went on with other numbers"
    assert (run / "exit_code").read_text() == "0\n"
    shutil.rmtree(run)
    return "went on"


def answer(command: Callable[[], object]) -> None:
    """A command answers, or ends with a message, as `megavlm.cli.main` prints them."""
    try:
        command()
    except MegavlmError as error:
        assert is_documented(str(error)), str(error)
    except OSError as error:
        assert error.filename is not None, error


def damage(run: Path, kind: str, name: str, chance: random.Random) -> None:
    path = run / name
    content = path.read_bytes() if path.is_file() else b""
    if kind == "unreadable":
        _refuse_to_read(path)
        return
    if kind == "renamed":
        path.rename(path.with_name(path.name + "-backup"))
        return
    if kind == "other":  # of a file beside it, or anywhere
        others = sorted(other for other in run.rglob("*") if other.is_file() and other != path)
        new = chance.choice(others).read_bytes()
    elif kind == "flip":
        place = chance.randrange(max(1, len(content)))
        new = content[:place] + bytes([(content + b"\0")[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
    else:
        new = {
            "cut": content[: chance.randrange(max(1, len(content)))],
            "garbage": chance.randbytes(max(10, len(content))),
            "zeros": bytes(len(content)),
            "deep": b"[" * 50_000,
            "list": b'[1, {"step": []}]',
        }.get(kind, b"")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        (path / "within").mkdir(parents=True)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "deleted":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(new)


def _refuse_to_read(path: Path) -> None:
    """Root may read everything, so the file system's answer is given here."""

    def open_(file, mode="r", *args, **options):
        if not isinstance(file, int) and os.fspath(file) == str(path) and not set(mode) & set("wxa"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return _OPEN(file, mode, *args, **options)

    io.open = builtins.open = open_


def _read_again() -> None:
    """What the test itself reads is not refused."""
    io.open = builtins.open = _OPEN
