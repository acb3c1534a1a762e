"""Names that users bring from elsewhere get a word of their own, and what is missing gets an example that is right."""

import pytest
import yaml

from megavlm.config import RunConfig, load_config
from megavlm.config.mistakes import all_paths
from megavlm.config.words import EXAMPLES, SOUGHT
from megavlm.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "word"), [("lora", "There is no LoRA"), ("optimizer.lr", "Set optimizer.learning_rate"), ("data.batch_size", "data.num_lanes")]
)
def test_what_is_sought_has_a_word(make_config, name, word):
    with pytest.raises(ConfigError, match=word) as caught:
        make_config({name: 1})
    assert "Did you mean" not in str(caught.value)


def test_no_setting_is_called_so_and_words_name_settings():
    paths = set(all_paths(RunConfig))
    assert not set(SOUGHT) & {path.rsplit(".", 1)[-1] for path in paths}
    for text in SOUGHT.values():
        for word in text.replace(",", " ").replace(";", " ").replace(":", " ").split():
            if word.split(".")[0] in RunConfig.model_fields and "." in word:
                assert word.rstrip(".") in paths, word


@pytest.mark.parametrize("text", ["", "{}", "# only a remark"])
def test_an_empty_recipe_names_what_is_missing_with_examples(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "r.yaml"))
    for name in ("run_dir", "model", "vocabulary", "data", "optimizer"):
        assert f"{name}: is missing and has no default, for example {EXAMPLES[name]}" in str(caught.value)


def test_the_examples_are_right(digits_folder, tmp_path):
    """Put together they are a recipe."""
    model = yaml.safe_load(EXAMPLES["model"].split(", …")[0] + "}}")
    model["model"]["architecture"] |= {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 32}
    blocks = [yaml.safe_load(EXAMPLES[name]) for name in ("run_dir", "vocabulary", "data", "optimizer")]
    tree = {key: value for block in [*blocks, model] for key, value in block.items()}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    overrides = {"data.pack_tokens": 1024, "optimizer.learning_rate": 1e-3}
    assert load_config(str(tmp_path / "r.yaml"), overrides).run_dir == "runs/mine"
