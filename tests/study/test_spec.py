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
