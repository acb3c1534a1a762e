"""A study becomes arms: which runs there are, and that they see equal tokens."""

from pathlib import Path

import pytest
import yaml

from megavlm.config import load_config
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts
from megavlm.routing.policies import Dense
from megavlm.study.spec import JOINT, load_study, plan_arms, write_array


def test_arms_that_agree_are_one(make_study):
    arms = plan_arms(make_study())
    names = {arm.folder.name: arm.policies for arm in arms}
    # generation alone is dense under late_drop too
    assert names["dense-generation-0"] == ("dense", "late_drop") and len(arms) == 2 * (3 * 3 - 1)
    by_name = {arm.folder.name: arm.config for arm in arms}
    assert by_name["late_drop-understanding-1"].routing.generation == Dense()
    assert by_name["late_drop-understanding-1"].evaluation.route == "trained"
    assert list(by_name["random_ltd-generation-0"].data.sources) == ["generation"]
    assert {arm.config.seed for arm in arms} == {0, 1}


def test_an_arm_alone_sees_as_many_tokens_of_its_task_as_the_joint_arm(make_study):
    study = make_study(seeds=[0])

    def labelled_tokens(config, task):
        config = Parts(config).with_mixture().config
        factory, total = Parts(config).make_lane, 0.0
        for number in range(config.data.num_lanes):
            lane = factory(number)
            total += sum(next(lane)[0].task_labels[task] for _ in range(100))
        return total

    arms = {(arm.policies[0], arm.data): arm.config for arm in plan_arms(study)}
    for task, name in enumerate(("understanding", "generation")):
        joint = labelled_tokens(arms["random_ltd", JOINT], task)
        assert labelled_tokens(arms["random_ltd", name], task) / joint == pytest.approx(1, abs=0.05)


def test_an_array_gives_the_same_recipes(make_study, tmp_path):
    study = make_study()
    arms = plan_arms(study)
    write_array(arms, tmp_path / "arms.yaml")
    for arm, changes in zip(arms, yaml.safe_load((tmp_path / "arms.yaml").read_text()), strict=True):
        again = load_config(study.recipe, {k: v for k, v in changes.items() if k != "name"} | {"run_dir": str(arm.folder)})
        assert again == arm.config and changes["name"] == arm.folder.name


def test_mistakes_are_named(make_study):
    with pytest.raises(ConfigError, match="policies has no 'dense'"):
        make_study(policies={"random_ltd": {}})
    with pytest.raises(ConfigError, match="seeds"):
        make_study(seeds=["many"])
    tasks = {
        task: {"sources": [source], "metrics": [{"name": "a", "path": "b"}]}
        for task, source in (("understanding", "understandings"), ("generation", "generation"))
    }
    with pytest.raises(ConfigError, match="no source understandings"):
        plan_arms(make_study(tasks=tasks))


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("megavlm/recipes/studies").glob("*.yaml")))
def test_the_policies_of_a_study_that_ships_fit_its_model(name):
    study = load_study(name)
    for policy in study.policies.values():
        config = load_config(study.recipe, study.overrides | policy)
        _ = Parts(config).phases


def test_dense_training_of_other_lengths_has_its_schedule_fitted(make_study):
    study = make_study(
        seeds=[0], dense_lengths=[0.75, 0.5], overrides=make_study().overrides | {"optimizer.num_steps": 40, "optimizer.warmup_steps": 8}
    )
    arms = {arm.folder.name: arm for arm in plan_arms(study)}
    lengths = {name: arm.config.optimizer for name, arm in arms.items() if name.startswith("dense_")}
    found = {name: (optimizer.num_steps, optimizer.warmup_steps) for name, optimizer in lengths.items()}
    assert found == {"dense_50-joint-0": (20, 4), "dense_75-joint-0": (30, 6)}
    assert list(arms)[:5] == ["dense-joint-0", "dense-generation-0", "dense-understanding-0", "dense_50-joint-0", "dense_75-joint-0"]


def test_more_seeds_are_for_the_policies_that_deserve_them(make_study):
    arms = plan_arms(make_study(seeds=[0], more_seeds=[1, 2], more_seeds_for=["random_ltd"], dense_lengths=[0.5]))
    found = {seed: {arm.folder.name.split("-")[0] for arm in arms if arm.seed == seed} for seed in (0, 1, 2)}
    assert found[0] == {"dense", "dense_50", "late_drop", "random_ltd"} and found[1] == found[2] == {"dense", "dense_50", "random_ltd"}


def test_mistakes_of_lengths_and_more_seeds_are_named(make_study):
    with pytest.raises(ConfigError, match="more_seeds_for: there is no policy tread"):
        make_study(more_seeds=[3], more_seeds_for=["tread"])
    with pytest.raises(ConfigError, match="dense_lengths makes arms dense_50, which policies has"):
        make_study(dense_lengths=[0.5], policies={"dense": {}, "dense_50": {}})
    with pytest.raises(ConfigError, match="dense_lengths.0: Input should be less than 1"):
        make_study(dense_lengths=[1.0])
