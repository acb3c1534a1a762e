"""The JSON file of `engine.deepspeed`: what contradicts the recipe, or would be passed over, is refused by name."""

import json

import pytest

from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.errors import ConfigError
from megavlm.system.files import PROJECT

ZERO3 = {"stage": 3}


@pytest.mark.parametrize("name", sorted(path.stem for path in (PROJECT / "ds_configs").glob("*.json")))
def test_what_ships_is_taken(name):
    assert read_deepspeed_file(name)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "there is no zero_optimization"),
        ({"zero_optimization": True}, "there is no zero_optimization"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: is 2"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage: is 3"),
        ({"zero_optimization": ZERO3 | {"stge": 3}}, "zero_optimization.stge"),
        ({"zero_optimization": ZERO3 | {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": ZERO3 | {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: offloading is not supported"),
        ({"zero_optimization": ZERO3, "timers": {}}, "timers: is said by the recipe's monitor"),
        ({"zero_optimization": ZERO3, "train_batch_size": 8}, "train_batch_size: is said by the recipe's data.num_lanes"),
        ({"zero_optimization": ZERO3, "fp16": {"enabled": True}}, "fp16: is said by the recipe's model.dtype"),
        ({"zero_optimization": ZERO3, "communication_data_type": "fp8"}, "communication_data_type: is fp8; give one of fp32, bf16"),
        ({"zero_optimization": ZERO3, "data_types": {"grad_accum_dtype": 32}}, "data_types.grad_accum_dtype: is 32"),
        ({"zero_optimization": ZERO3, "data_types": {"param_dtype": "fp32"}}, "data_types: may hold grad_accum_dtype alone"),
        ({"zero_optimization": ZERO3, "data_types": "fp32"}, "data_types: may hold grad_accum_dtype alone"),
        ({"zero_optimization": ZERO3, "no_such_key": 1}, "no_such_key: DeepSpeed would pass over it"),
    ],
)
def test_what_is_refused(tmp_path, document, message):
    path = tmp_path / "d.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_file(str(path))
    assert message in str(caught.value)
    assert "\n  do:" in str(caught.value)
