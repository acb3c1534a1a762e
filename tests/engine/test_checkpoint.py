"""Complete or invisible, verified, and loadable at another world size (P9, P11 for a save that was cut off)."""

import shutil

import pytest

from megavlm.config import load_config
from megavlm.engine.manifest import complete_checkpoints, verify
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train


@pytest.fixture(scope="module")
def trained(digits_folder, tmp_path_factory):
    """A run folder with checkpoints of steps 2 and 4, written by 2 ranks; its config; what came out."""
    run = tmp_path_factory.mktemp("run")
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    places = {"run_dir": str(run), "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    config = load_config("digits", TINY | places | {"checkpoint.every_steps": 2})
    return run, config, run_ranks(2, train, config, 4)


@pytest.mark.parametrize("world_size", [1, 4])
def test_loads_at_another_world_size(trained, world_size):
    _, config, results = trained
    resumed = run_ranks(world_size, train, config, 4)[0]  # already at the end: restores, does nothing
    assert resumed["first"] == 4
    for name, value in results[0]["weights"].items():
        assert value.equal(resumed["weights"][name]), name


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named(trained, damage, tmp_path):
    copy = tmp_path / "step-00000004"
    shutil.copytree(trained[0] / "checkpoints" / copy.name, copy)
    assert verify(copy) == []
    for file in sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json"):
        content = file.read_bytes()
        if damage == "remove":
            file.unlink()
        else:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else content[:-1])
        problems = verify(copy)
        assert len(problems) == 1 and problems[0].startswith(str(file.relative_to(copy)))
        file.write_bytes(content)


def test_a_save_that_was_cut_off_is_invisible(trained, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".writing-step-00000006" / "tensors").mkdir(parents=True)
    (folder / "step-00000005").mkdir()
    assert complete_checkpoints(folder) == []


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    run, config, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = complete_checkpoints(copy / "checkpoints")[-1]
    part = next((newest / "tensors").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(AssertionError, match=f"{part.name} has .* bytes instead of"):
        run_ranks(1, train, config.model_copy(update={"run_dir": str(copy)}), 6)


def test_working_precision_follows_the_masters(trained):
    """Without the copy into the partitions that the forward pass reads, the first loss after a resume is the initial one."""
    _, config, results = trained
    expected = run_ranks(2, train, config, 5)[0]["losses"][0]["loss/generation"]
    assert results[0]["losses"][0]["loss/generation"] > expected + 0.3, "the two losses must be far apart"
    bfloat16 = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    assert run_ranks(2, train, bfloat16, 5)[0]["losses"][0]["loss/generation"] == pytest.approx(expected, rel=1e-2)
