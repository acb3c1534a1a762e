"""The study of the digits, tiny."""

import pytest
import yaml

from megavlm.study.spec import load_study
from megavlm.system.files import RECIPES
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
        tree = yaml.safe_load((RECIPES / "studies" / "digits.yaml").read_text())
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
