from typing import Annotated, get_args, get_origin

import pytest
import yaml
from pydantic import BeforeValidator

from megavlm.config import RunConfig, load_config, save_config
from megavlm.config.document import parse_yaml
from megavlm.config.mistakes import nearest_path
from megavlm.errors import ConfigError
from megavlm.routing.policies import POLICIES
from megavlm.settings import Settings
from tests.conftest import TINY


def test_all_mistakes_are_reported_at_once_with_path_value_and_nearest_name(make_config):
    wrong = {
        "optimizer.num_stepz": 3,
        "data.num_lanes": "many",
        "routing.generation": {"policy": "random_ltd", "keep_ratio": 2},
        "routing.understanding": {"policy": "late_dorp"},
        "data.sources.understanding.weigth": 2,
    }
    with pytest.raises(ConfigError) as caught:
        make_config(wrong)
    message = str(caught.value)
    assert "5 mistakes" in message
    assert "optimizer.num_stepz: there is no such setting (value 3). Did you mean optimizer.num_steps?" in message
    assert "data.num_lanes" in message and "'many'" in message
    assert "routing.generation.keep_ratio" in message and "value 2" in message
    assert "routing.understanding.policy: there is no 'late_dorp'. Did you mean late_drop?" in message
    assert "Did you mean data.sources.understanding.weight?" in message


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("num_steps", "optimizer.num_steps"),
        ("model.dtipe", "model.dtype"),
        ("vocabulary.image_tokenizer.level", "vocabulary.image_tokenizer.levels"),
    ],
)
def test_nearest_path(given, nearest):
    assert nearest_path(given) == nearest


def test_overrides_are_read_as_yaml(make_config):
    config = make_config({"data.num_lanes": "8", "monitor.sample_every_steps": "null", "optimizer.betas": "[0.8, 0.9]"})
    assert (config.data.num_lanes, config.monitor.sample_every_steps, config.optimizer.betas) == (8, None, (0.8, 0.9))


def test_a_saved_configuration_reads_back_equal(make_config, tmp_path):
    config = make_config()
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="digits"):
        load_config("digit")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", ""])
def test_a_recipe_that_is_no_mapping(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="r.yaml"):
        load_config(str(tmp_path / "r.yaml"))


def test_every_setting_has_a_description():
    def undescribed(model, prefix=""):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(RunConfig)) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.num_lanes": True}, "data.num_lanes: true and false are no numbers"),
        ({"optimizer.betas": [True, 0.9]}, "optimizer.betas.0: true and false are no numbers"),
        ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas.1"),
        ({"checkpoint.background": 1}, "checkpoint.background"),
        ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate: Input should be a finite number"),
        ({"optimizer.weight_decay": ".nan"}, "optimizer.weight_decay: Input should be a finite number"),
        ({"data.pack_tokens": 10**12}, "data.pack_tokens"),
        ({"seed": 2**63}, "a number beyond 64 bits"),
        (
            {"routing.generation": {"policy": "mixture_of_depths", "first_layer": 1}},
            "routing.generation.first_layer: there is no such setting (value 1). Another kind of routing.generation has it",
        ),
        ({"init_from": "a" * 256}, "init_from: has a part of more than 255 bytes"),
        ({"run_dir": "runs/" + "ü" * 128}, "run_dir: has a part of more than 255 bytes"),
        ({"optimizer.warmup_steps": 7}, "optimizer.warmup_steps: the warm-up of 7 steps is longer than the run of 6"),
        ({"loss.task_weights": {"understanding": 0, "generation": 0, "text": 0}}, "loss.task_weights: all are 0"),
        ({"routing.warmup_fraction": 0.6, "routing.dense_finish_fraction": 0.6}, "routing.warmup_fraction: with dense_finish_fraction"),
        ({"data.pack_tokens": 10**6, "loss.chunk_rows": 1}, "loss.chunk_rows"),
        ({"data.sources": {"a/b": {"shards": "x"}}}, "leave out slashes"),
        ({"data.sources": {"a": {"shards": ["x", True]}}}, "data.sources.a.shards.1: Input should be a valid string"),
        ({"data.sources": {"a": {"shards": "x{"}}}, "data.sources.a.shards: has braces that do not match"),
        ({"data.sources": {"a": {"shards": "x", "weight": 1e-6}, "b": {"shards": "y", "weight": 1e6}}}, "never comes up"),
        ({"model.architecture": {"model_type": {1: 2}}}, "a name is a int; quote it"),
    ],
)
def test_what_cannot_be_is_a_mistake_of_the_recipe(make_config, overrides, message):
    with pytest.raises(ConfigError, match="mistake") as caught:
        make_config(overrides)
    assert message in str(caught.value)
    assert "\n  do:" in str(caught.value)


def test_no_number_is_a_boolean_and_every_number_is_bounded():
    """Every field of the tree, also one that is added tomorrow."""

    def numbers(annotation, name, metadata=()):
        if get_origin(annotation) is Annotated:
            yield from numbers(get_args(annotation)[0], name, (*metadata, *get_args(annotation)[1:]))
        elif annotation in (int, float):
            yield name, metadata
        elif isinstance(annotation, type) and issubclass(annotation, Settings):
            for field_name, field in annotation.model_fields.items():
                yield from numbers(field.annotation, f"{name}.{field_name}", tuple(field.metadata))
        else:
            for part in get_args(annotation):
                yield from numbers(part, name)

    # another test may have registered a user's
    shipped = [policy for policy in POLICIES.values() if policy.__module__.startswith("megavlm.")]
    found = [number for root in (RunConfig, *shipped) for number in numbers(root, root.__name__)]
    assert len(found) > 60
    for name, metadata in found:
        kinds = [bound for item in metadata for bound in ([item] if not hasattr(item, "metadata") else item.metadata)]
        assert any(isinstance(item, BeforeValidator) for item in kinds), f"{name} takes true for a number"
        assert any(hasattr(item, "le") or hasattr(item, "lt") for item in kinds), f"{name} has no upper bound"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1e-06", 1e-6), ("010", "010"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("1_000", 1000), (".5", 0.5)],
)
def test_yaml_is_read_as_people_mean_it(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize("text", ["a: 1\na: 2", "!!int x", "!!python/name:os.system", "[" * 5000, "9" * 5000, "? [a]\n: b"])
def test_what_is_no_yaml(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text", ["run_dir: &a [*a]", "run_dir: !!set {a}", 'run_dir: "\\ud800"', 'run_dir: "a\\0b"', "1: 2", "seed: 18446744073709551616"]
)
def test_values_that_no_recipe_holds(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mistake.*\n  .*\n  do:"):
        load_config(str(tmp_path / "r.yaml"))


def test_overrides_are_left_as_they_were(make_config):
    architecture = dict(TINY["model.architecture"])
    overrides = {"model.architecture": architecture, "model.architecture.num_hidden_layers": 2}
    assert make_config(overrides).model.architecture["num_hidden_layers"] == 2
    assert architecture == TINY["model.architecture"]
