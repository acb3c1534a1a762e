"""Every file of a run folder cut, emptied, replaced, at every start: a message, or the numbers of the run that nobody damaged."""

import random

import pytest

from tests.distributed.ranks import run_ranks
from tests.fuzz.folder_work import KINDS, train_to_the_end, try_folder
from tests.fuzz.harness import try_cases

SETTINGS = {
    "optimizer.num_steps": 4,
    "checkpoint.every_steps": 2,
    "data.num_lanes": 1,
    "data.num_workers": 0,
}


def begun(world, config):
    from megavlm.system import world as distributed

    distributed.start = lambda timeout_s: world
    return train_to_the_end(config)


@pytest.fixture(scope="module")
def whole(digits_folder, tmp_path_factory):
    """A run folder after step 4, `make(run_dir, num_steps)`, and the digest of the same run after step 5."""
    from megavlm.config import load_config
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("whole")
    sources = {task: {"shards": f"{digits_folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")}
    places = {"vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}

    def make(run_dir, num_steps=5):
        return load_config("digits", TINY | SETTINGS | places | {"run_dir": str(run_dir), "optimizer.num_steps": num_steps})

    # packs and learning rates know the last step
    (expected,) = run_ranks(1, begun, make(folder / "undisturbed"))
    run_ranks(1, stopped_at_four, make(folder / "run"))
    run = folder / "run"
    (run / "exit_code").write_text("75\n")
    (run / "slurm").mkdir()
    (run / "slurm" / "7.job").write_text("7\n")
    (run / "forensics").mkdir()
    (run / "forensics" / "step-00000003.json").write_text("{}")
    (run / "hangs" / "step-00000004").mkdir(parents=True)
    (run / "hangs" / "step-00000004" / "noticed").touch()
    return run, make, expected


def stopped_at_four(world, config):
    from megavlm.launch.train import _keep_environment, make_trainer

    trainer = make_trainer(config, world)
    _keep_environment(trainer.folder.environment, 1)
    for step in range(4):
        trainer.train_step(step)
        trainer.step = step + 1
        trainer._report(step, 1.0)
        if trainer.step % 2 == 0:
            trainer.save()
    trainer.checkpointer.close()
    trainer.board.close()


def cases(whole, tmp_path, number: int, seed: int):
    """All single damages in random order, then pairs of them."""
    run, make, expected = whole
    chance = random.Random(seed)
    names = [str(path.relative_to(run)) for path in sorted(run.rglob("*"))] + ["save"]
    single = [[(kind, name)] for kind in KINDS for name in names if (run / name).exists() or kind in ("folder", "loop", "pipe")]
    chance.shuffle(single)
    pairs = ([(chance.choice(KINDS[:-1]), chance.choice(names)), chance.choice(single)[0]] for _ in range(number))
    for count, damages in enumerate([*single, *pairs][:number]):
        # both at once may be of one file
        if len({name.split("/")[0] if kind != "flip" else name for kind, name in damages}) < len(damages):
            damages = damages[:1]
        yield " and ".join(f"{kind} {name}" for kind, name in damages), (run, make(tmp_path / str(count)), expected, damages, count)


def table_of(whole, tmp_path, number: int, seed: int):
    chosen = {f"{count}: {name}": case for count, (name, case) in enumerate(cases(whole, tmp_path, number, seed))}
    return try_cases(try_folder, chosen, seconds=90, title=f"run folders, seed {seed}")


def test_twenty_damaged_run_folders(whole, tmp_path):
    table = table_of(whole, tmp_path, 20, seed=1)
    print(table)
    table.check()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_five_hundred_damaged_run_folders(whole, tmp_path):
    table = table_of(whole, tmp_path, 500, seed=0)
    print(table)
    table.check()
