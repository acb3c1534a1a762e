"""Every setting with every hostile value, pairs of them, and damaged text: a documented message, or a first step with a finite loss."""

import logging
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml

from tests.fuzz import corpus
from tests.fuzz.harness import Table, try_cases

SECONDS = 120
STARTED_SECONDS = 400
"""A thousand layers take their time."""
MACHINE_BYTES = 1 << 30
"""What the cases are told that the machine has: a model that needs more must be refused, not tried."""
SEED = 17


def read_recipe(text: str, folder: str) -> str:
    """Only read it: most recipes end here."""
    from megavlm.config import load_config

    os.chdir(folder)
    recipe = Path(folder) / "recipe.yaml"
    recipe.write_bytes(text.encode(errors="surrogatepass"))
    load_config(str(recipe))
    return "accepted"


def train_one_step(text: str, folder: str) -> str:
    """Write a recipe, read it, start its run and take a step."""
    from megavlm.config import load_config
    from megavlm.engine.watchdog import Watchdog
    from megavlm.launch.train import make_trainer
    from megavlm.parts import fitness
    from megavlm.system import world as distributed

    fitness.machine_bytes = lambda: MACHINE_BYTES
    # the harness watches; a budget of a second is no mistake
    Watchdog._watch = lambda self: None
    logging.getLogger().setLevel(logging.INFO)
    place = Path(folder) / str(os.getpid())
    place.mkdir()
    os.chdir(place)
    try:
        recipe = place / "recipe.yaml"
        recipe.write_bytes(text.encode(errors="surrogatepass"))
        trainer = make_trainer(load_config(str(recipe)), distributed.start(60))
        norm = trainer.train_step(0)
        trainer.guard.settle(keep=0)
        trainer._report(0, float(norm))
        for observer in trainer.observers:
            observer.after_step(1)
        losses = {name: value for name, value in trainer._reported.items() if name.startswith("loss/")}
        assert losses, "no loss was reported"
        assert all(map(math.isfinite, [float(norm), *losses.values()])), f"norm {norm}, losses {losses}"
        trainer._close()
        return "first step"
    finally:
        os.chdir("/")
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def recipe(make_config):
    """The tiny recipe with every setting written out, and what a run finds out about its data."""
    from megavlm.parts.parts import Parts

    tree = (
        Parts(make_config({"checkpoint.background": False, "data.mixture_samples": 32, "engine.timeout_s": 600}, "run"))
        .with_mixture()
        .config.model_dump(mode="json")
    )
    tree["data"]["mixture"] = None
    return tree


def fuzz(recipe, folder: Path, num_single: int, num_pairs: int, num_mangled: int, num_started: int) -> list[Table]:
    """All of them read; of those that are accepted so many started."""
    rng = random.Random(SEED)
    single = list(corpus.single_edits())
    chosen = rng.sample(single, min(num_single, len(single))) + list(corpus.pairs(rng, num_pairs))
    texts = {name: corpus.edited(recipe, edits) for name, edits in chosen}
    whole = yaml.safe_dump(recipe, sort_keys=False)
    texts |= dict(corpus.mangled(whole, rng, num_mangled))
    cases = {name: (text, str(folder)) for name, text in texts.items()}
    read = try_cases(read_recipe, cases, seconds=SECONDS, per_process=500, title="recipes read")
    accepted = [outcome.name for outcome in read.outcomes if outcome.kind == "accepted"]
    started = {name: cases[name] for name in rng.sample(accepted, min(num_started, len(accepted)))}
    started["as it is"] = (whole, str(folder))
    return [read, try_cases(train_one_step, started, seconds=STARTED_SECONDS, title="recipes started")]


def check(tables: list[Table]) -> None:
    print("", *tables, sep="\n")
    for table in tables:
        table.check()
    assert {outcome.name: outcome.kind for outcome in tables[1].outcomes}["as it is"] == "first step"


def test_some_recipes(recipe, tmp_path):
    check(fuzz(recipe, tmp_path, 150, 20, 30, num_started=6))


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_all_recipes(recipe, tmp_path):
    tables = fuzz(recipe, tmp_path, 4800, 600, 600, num_started=6000)
    check(tables)
    assert len(tables[0].outcomes) >= 5000
