"""What `keep_best` ranks by is named, and is reported."""

import pytest

from megavlm.errors import ConfigError
from megavlm.monitor.tags import is_tag


def test_keep_best_needs_a_metric_that_the_run_reports(make_config):
    with pytest.raises(ConfigError, match="checkpoint.best_metric: keep_best needs the tag(.|\n)*loss of training"):
        make_config({"checkpoint.keep_best": 1})
    with pytest.raises(ConfigError, match="no 'loss/generatoin'. Did you mean loss/generation?"):
        make_config({"checkpoint.keep_best": 1, "checkpoint.best_metric": "loss/generatoin"})
    with pytest.raises(ConfigError, match="Did you mean loss_by_source/generation/generation?"):
        make_config({"checkpoint.keep_best": 1, "checkpoint.best_metric": "loss_by_source/gneration/generation"})
    for tag in ("loss/generation", "loss_by_source/understanding/understanding", "kept_tokens/generation/stage_0_layers_0-1"):
        assert make_config({"checkpoint.keep_best": 1, "checkpoint.best_metric": tag}).checkpoint.best_metric == tag
    # what a run of an earlier version has kept of its defaults
    assert make_config({"checkpoint.best_metric": "anything"}).checkpoint.keep_best == 0
    assert not is_tag("loss_by_source/a/generation", ["a"]), "of a single source there is no such tag"
