"""docs/settings.md says what the schema says, of every setting; `recipe show` says it of a recipe."""

import re
from pathlib import Path

from megavlm.config import RunConfig, load_config
from megavlm.config.mistakes import all_paths
from megavlm.config.reference import blocks, describe, page
from megavlm.config.timeline import timeline

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run `python tools/settings_page.py`"


def test_every_setting_is_in_it():
    named = {setting.path for block in blocks() for setting in block.settings}
    titles = {block.title for block in blocks()}
    # of the alternatives for `routing.generation` and for phases the page says that they are the same
    again = re.compile(r"routing\.(generation|phases\.\*\.(understanding|generation))\.")
    wanted = {path for path in all_paths(RunConfig) if not again.match(path)}
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


def test_phases_are_shown_with_their_values():
    phases = [
        {"fraction": 0.75, "generation": {"policy": "random_ltd", "keep_ratio": 0.25}},
        {"fraction": 0.25, "optimizer": {"schedule": "wsd"}},
    ]
    lines = describe(load_config("digits", {"routing": {"phases": phases}}))
    assert "routing.phases.0.fraction: 0.75  (share of the steps, no default)" in lines
    assert "routing.phases.0.generation.keep_ratio: 0.25  (share, 0 to 1, no default)" in lines
    assert "routing.phases.1.optimizer.schedule: wsd  (default none)" in lines
    assert lines[-2:] == [
        "phase 1 of 2, steps 1 to 750: reading dense, drawing random_ltd(keep_ratio=0.25); "
        "learning rate: up to 0.002 in 100 steps, then along a cosine to 0.0002, 750 steps in all",
        "phase 2 of 2, steps 751 to 1000: everything is kept; "
        "learning rate: up to 0.002 in 100 steps, then constant, and down to 0.0002 in 50, 250 steps in all",
    ]


def test_a_warm_up_and_a_dense_finish_are_shown_as_phases():
    settings = {"routing.warmup_fraction": 0.2, "routing.dense_finish_fraction": 0.25, "optimizer.schedule": "constant"}
    first, second = timeline(load_config("digits", settings))
    assert (
        first.startswith("phase 1 of 2, steps 1 to 750: reading random_ltd(keep_ratio=0.5), drawing")
        and "kept until step 200; lear" in first
    )
    assert second == "phase 2 of 2, steps 751 to 1000: everything is kept"
