"""A study becomes arms: which runs there are, and that they see equal tokens."""

from pathlib import Path

import pytest
import yaml

from megavlm.config import load_config
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts
from megavlm.routing.policies import Dense
from megavlm.study.spec import JOINT, load_study, plan_arms, write_array
from tests.conftest import TINY

POLICIES = {
    "dense": {},
    "late_drop": {"routing.understanding": {"policy": "late_drop", "after_layer": 1}, "evaluation.route": "trained"},
    "random_ltd": {task: {"policy": "random_ltd", "keep_ratio": 0.5} for task in ("routing.understanding", "routing.generation")},
}


@pytest.fixture
def make_study(digits_folder, tmp_path):
    """``make_study(changes)``: the study of the digits, tiny."""

    def make(**changes):
        tree = yaml.safe_load(open("megavlm/recipes/studies/digits.yaml"))
        sources = {task: {"shards": f"{digits_folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")}
        tree["overrides"] = {name: value for name, value in tree["overrides"].items() if not name.startswith("data.sources.")}
        tree["overrides"] |= {name: value for name, value in TINY.items() if not name.startswith("routing")} | {
            "vocabulary.text_model": str(digits_folder / "text.model"),
            "data.sources": sources,
            "evaluation.shards": [f"{digits_folder}/{task}-test-00.tar" for task in ("understanding", "generation")],
            "evaluation.num_drawings": 20,
        }
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
            tree["overrides"].pop(f"model.architecture.{name}", None)
        tree |= {"study_dir": str(tmp_path / "study"), "policies": POLICIES, "seeds": [0, 1]} | changes
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
        return load_study(str(tmp_path / "study.yaml"))

    return make


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
        Parts(config).plan
