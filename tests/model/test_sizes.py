"""Numbers that no architecture has are named when the recipe is read; sizes are counted without memory."""

import pytest

from megavlm.errors import ConfigError
from megavlm.model.configuration import read_configuration
from megavlm.model.sizes import check_numbers, parameter_sizes
from tests.conftest import TINY

ARCHITECTURE = TINY["model.architecture"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0"),
        ("initializer_range", float("inf"), "initializer_range is inf"),
        ("initializer_range", -1, "initializer_range is -1"),
        ("rope_parameters", {"rope_theta": -1.0}, "rope_theta is -1.0"),
        ("num_hidden_layers", 10**6, "num_hidden_layers is 1000000, more than"),
        ("hidden_size", 10**12, "hidden_size is 1000000000000, more than"),
        ("head_dim", 7, "head_dim is 7"),
        ("attention_dropout", 1.5, "attention_dropout is 1.5"),
        ("hidden_act", "sillu", "hidden_act 'sillu' is no activation"),
        ("max_position_embeddings", 0, "max_position_embeddings is 0"),
    ],
)
def test_numbers_of_no_model(make_config, field, value, message):
    with pytest.raises(ValueError, match=message):
        check_numbers(ARCHITECTURE | {field: value})
    with pytest.raises(ConfigError, match="model.architecture"):
        make_config({f"model.architecture.{field}": value})


def test_all_of_them_at_once():
    with pytest.raises(ValueError, match="rms_norm_eps is -1.*initializer_range is 11"):
        check_numbers(ARCHITECTURE | {"rms_norm_eps": -1, "initializer_range": 11})


def test_counting_needs_no_memory():
    config = read_configuration(ARCHITECTURE | {"intermediate_size": 10**9}, 100)
    assert sum(parameter_sizes(config)) > 4 * 3 * 32 * 10**9
