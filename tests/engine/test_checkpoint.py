"""Complete or invisible, verified, and loadable at another world size (P9, P11 for a save that was cut off)."""

import re
import shutil

import pytest

from megavlm.config import load_config
from megavlm.runs.manifest import complete_checkpoints, verify
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import (
    restore_and_listen,
    save_after_a_newer_start,
    save_with_other_group_steps,
    train,
    train_while_writing,
    train_with_a_full_disk,
)


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


def test_a_damaged_checkpoint_is_refused_and_the_newest_intact_one_is_taken(trained, tmp_path, caplog):
    """Whichever file it is; and nothing is left if all are damaged."""
    run, config, _ = trained
    for number, name in enumerate(["manifest.json", "state.json", "tensors/layout.json", "tensors/rank-00001.safetensors"]):
        copy = tmp_path / f"run-{number}"
        shutil.copytree(run, copy)
        flip(complete_checkpoints(copy / "checkpoints")[-1] / name)
        here = config.model_copy(update={"run_dir": str(copy)})
        if number < 3:
            log = restored_alone(here)
            assert log["step"] == 2
            assert f"step-00000004 is damaged and not taken: {name}" in log["log"]
            assert [p.name[:21] for p in (copy / "checkpoints").glob("damaged-*")] == ["damaged-step-00000004"]
        else:
            flip(copy / "checkpoints" / "step-00000002" / name)
            for _ in range(2):  # the second start does not begin at step 0 either
                with pytest.raises(AssertionError, match="every checkpoint of this run is damaged(.|\n)*rank-00001\\S* has another"):
                    run_ranks(1, train, here, 6)


def test_a_checkpoint_without_its_manifest_is_damaged(trained, tmp_path):
    """And it is no matter what else lies beside it, or that an earlier version has renamed the damaged ones."""
    run, config, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    here, checkpoints = config.model_copy(update={"run_dir": str(copy)}), copy / "checkpoints"
    (checkpoints / "step-00000004" / "manifest.json").unlink()
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000009-backup")
    result = restored_alone(here)
    assert result["step"] == 2 and "step-00000004 is damaged and not taken: manifest.json is missing" in result["log"]
    (checkpoints / "step-00000002").rename(checkpoints / "damaged-step-00000002-x")
    with pytest.raises(
        AssertionError, match="every checkpoint of this run is damaged(.|\n)*damaged-step-00000002-x: was damaged and set aside"
    ):
        restored_alone(here)
    shutil.rmtree(checkpoints)
    assert restored_alone(here)["step"] == 0


def test_a_checkpoint_of_another_model_is_refused(trained, tmp_path):
    """A run folder whose config.yaml was lost cannot say so before."""
    run, config, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "config.yaml").unlink()
    wider = config.model.model_copy(update={"architecture": config.model.architecture | {"intermediate_size": 48}})
    with pytest.raises(AssertionError, match="step-00000004 does not fit this model: .*\n  do:    give the model"):
        restored_alone(config.model_copy(update={"run_dir": str(copy), "model": wider}))


def test_changed_sources_are_refused_before_the_folder_changes(trained, tmp_path):
    run, config, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "config.yaml").read_bytes()
    sources = {"generation": config.data.sources["generation"]}
    for policy in ("strict", "allow_add_remove"):
        data = config.data.model_copy(update={"sources": sources, "when_sources_change": policy})
        here = config.model_copy(update={"run_dir": str(copy), "data": data})
        if policy == "strict":
            with pytest.raises(AssertionError, match="sources have changed since the checkpoint:\n  removed: understanding"):
                run_ranks(1, train, here, 4)
            assert (copy / "config.yaml").read_bytes() == before
        else:
            assert run_ranks(1, train, here, 5)[0]["first"] == 4
            assert list(load_config(str(copy / "config.yaml")).data.sources) == ["generation"]


def restored_alone(config):
    return run_ranks(1, restore_and_listen, config)[0]


def flip(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


TIED = {
    "model.architecture": TINY["model.architecture"] | {"tie_word_embeddings": True},
    "optimizer.num_steps": 23,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_every_steps": 3,
}


def test_save_at_4_resume_at_1_2_and_4_and_back(make_config, tmp_path):
    """P9 with tied embeddings and two parameter groups: state bit-identical, data identical, the next 20 losses equal."""
    saved = run_ranks(4, train, make_config(TIED, tmp_path / "4"), 3)
    whole = run_ranks(4, train, make_config(TIED | {"checkpoint.every_steps": 100}, tmp_path / "whole"), 23)
    for world_size in (1, 2, 4):
        shutil.copytree(tmp_path / "4", tmp_path / f"to-{world_size}")
        results = run_ranks(world_size, train, make_config(TIED, tmp_path / f"to-{world_size}"), 23)
        assert results[0]["first"] == 3 and len(results[0]["losses"]) == 20
        assert_equal(results[0]["restored"], saved[0]["weights"])
        assert data_of(results) == data_of(whole)[3:]
        for tag in ("loss/understanding", "loss/generation"):
            expected = [losses[tag] for losses in whole[0]["losses"][3:]]
            assert [losses[tag] for losses in results[0]["losses"]] == pytest.approx(expected, rel=2e-4), tag
        if world_size == 4:
            assert_equal(results[0]["weights"], whole[0]["weights"])
    # and back: what one process saved, four take over
    back = run_ranks(4, train, make_config(TIED, tmp_path / "to-1"), 21)[0]
    alone = run_ranks(1, train, make_config(TIED, tmp_path / "to-1"), 21)[0]
    assert back["first"] == alone["first"] == 21
    assert_equal(back["restored"], alone["restored"])
    assert saved[0]["group_steps"] == {"decay": 3, "no_decay": 3} and back["group_steps"] == {"decay": 21, "no_decay": 21}


def data_of(results):
    """Ids of every step, over all ranks, in lane order."""
    return [sorted(pack for rank in step for pack in rank) for step in zip(*(result["ids"] for result in results))]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not first[name].equal(second[name])]
    assert not different, different


def test_every_group_keeps_its_own_step_counter(trained, tmp_path):
    """DeepSpeed's universal format gives all groups the first one's."""
    run, config, _ = trained
    shutil.copytree(run, tmp_path / "run")
    here = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    assert run_ranks(2, save_with_other_group_steps, here)[0] == {"decay": 4, "no_decay": 9}
    assert run_ranks(1, train, here, 5)[0]["group_steps"] == {"decay": 4, "no_decay": 9}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failing_write_is_told_and_the_run_goes_on(make_config, tmp_path, world_size):
    """One rank may write no more than a few bytes: the save fails on all ranks alike, the older checkpoint stays."""
    results = run_ranks(world_size, train_with_a_full_disk, make_config(run_dir=tmp_path / "run"))
    for result in results:
        assert [saved.step for saved in result["saves"]] == [1, 2, 3]
        assert [bool(saved.error) for saved in result["saves"]] == [False, True, False]
        assert re.search(r"File too large.* MB are free there", result["saves"][1].error)
    assert "step 2 could not be written" in results[0]["log"] and "newest complete one is step-00000001" in results[0]["log"]
    checkpoints = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000001", "step-00000003"]
    assert all(verify(path) == [] for path in checkpoints) and not list((tmp_path / "run" / "checkpoints").glob(".writing*"))


def test_training_goes_on_while_a_checkpoint_is_written(make_config, tmp_path):
    """The file system hangs until two more steps are done; what is saved is the state at the time of the call."""
    result = run_ranks(2, train_while_writing, make_config(run_dir=tmp_path / "run"))[0]
    assert result["steps_done_before_the_write"] == 3
    again = run_ranks(2, train, make_config(run_dir=tmp_path / "run"), 1)[0]
    assert again["first"] == 1
    assert_equal(again["restored"], result["weights_when_called"])


def test_a_superseded_start_writes_nothing_more(make_config, tmp_path):
    message = run_ranks(2, save_after_a_newer_start, make_config(run_dir=tmp_path / "run"))
    assert all("another start of this run owns" in text for text in message)
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_working_precision_follows_the_masters(trained):
    """Without the copy into the partitions that the forward pass reads, the first loss after a resume is the initial
    one."""
    _, config, results = trained
    expected = run_ranks(2, train, config, 5)[0]["losses"][0]["loss/generation"]
    assert results[0]["losses"][0]["loss/generation"] > expected + 0.3, "the two losses must be far apart"
    bfloat16 = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    assert run_ranks(2, train, bfloat16, 5)[0]["losses"][0]["loss/generation"] == pytest.approx(expected, rel=1e-2)
