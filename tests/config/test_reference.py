"""docs/settings.md says what the schema says, of every setting; `recipe show` says it of a recipe."""

from pathlib import Path

from megavlm.config import RunConfig, load_config
from megavlm.config.mistakes import all_paths
from megavlm.config.reference import blocks, describe, page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run `python tools/settings_page.py`"


def test_every_setting_is_in_it():
    named = {setting.path for block in blocks() for setting in block.settings}
    titles = {block.title for block in blocks()}
    # of the alternatives for `routing.generation` the page says that they are the same
    wanted = {path for path in all_paths(RunConfig) if not path.startswith("routing.generation.")}
    missing = {path for path in wanted - named if not any(title.split(":")[0] == path or title.startswith(f"{path}.") for title in titles)}
    assert not missing
    assert all(setting.meaning and setting.kind for block in blocks() for setting in block.settings)


def test_a_recipe_is_shown_with_its_values():
    lines = describe(load_config("digits"))
    assert "optimizer.learning_rate: 0.002  (no default)" in lines
    assert "engine.timeout_s: 2400  (seconds, default 2400)" in lines
    assert "routing.generation.keep_ratio: 0.5  (share, 0 to 1, no default)" in lines
    assert "data.sources.understanding.weight: 1.0  (default 1.0)" in lines
    assert "vocabulary.image_tokenizer.levels: 17  (default 17)" in lines
