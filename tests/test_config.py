import pytest

from megavlm.config import RunConfig, load_config, save_config
from megavlm.config.mistakes import nearest_path
from megavlm.errors import ConfigError


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
