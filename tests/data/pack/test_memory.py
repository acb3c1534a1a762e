"""What packs hold for the backward pass stays within `data.pack_rows` at every moment of the route's schedule."""

import numpy as np
import pytest

from megavlm.config import load_config
from megavlm.data.pack.config import DataConfig
from megavlm.data.pack.mixture import pack_bounds, pack_sizes, target_flops
from megavlm.data.pack.pack import Costing
from megavlm.data.pack.packer import choose
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.simulate import SHAPE_7B, standard_mixture
from megavlm.errors import DataError
from megavlm.parts.parts import Parts
from megavlm.routing.config import RoutingConfig
from megavlm.routing.phases import Phases
from megavlm.routing.policies import (
    Dense,
    KVInjection,
    LateDrop,
    LateEntry,
    Merge,
    MixtureOfDepths,
    Pyramid,
    RandomLTD,
    SharedBypass,
    Tread,
)
from tests.conftest import TINY
from tests.data.conftest import pair, write_shard

NUM_STEPS = 40
BYPASS = SharedBypass(keep_ratio=0.25, first_layer=2, end_layer=-2)
POLICIES = {
    "dense": (Dense(), Dense()),
    "late_drop": (LateDrop(after_layer=2), Dense()),
    "pyramid": (Pyramid(keep_ratio=0.5), RandomLTD(keep_ratio=0.5)),
    "late_entry": (LateEntry(at_layer=9), LateEntry(at_layer=9)),
    "tread": (Tread(keep_ratio=0.3), Tread(keep_ratio=0.3)),
    "shared_bypass": (BYPASS, BYPASS),
    "mixture_of_depths": (MixtureOfDepths(keep_ratio=0.2), MixtureOfDepths(keep_ratio=0.2)),
    "merge": (Merge(at_layer=3, keep_ratio=0.5), Dense()),
    "kv_injection": (KVInjection(), KVInjection()),
}
SOURCES = {name: SourceConfig(shards="none") for name in ("understanding", "generation")}


def sizes_over_the_schedule(policies, **settings) -> np.ndarray:
    """Tokens, and rows per layer, of packs from the first step of a run to its last ``[steps, 2]``."""
    routing = RoutingConfig(understanding=policies[0], generation=policies[1], warmup_fraction=0.25, dense_finish_fraction=0.25)
    costing = Costing(Phases(routing.phases_in(NUM_STEPS), SHAPE_7B.num_layers), SHAPE_7B)
    config, mixture = DataConfig(sources=SOURCES, look_ahead_samples=64, **settings), standard_mixture(256)
    rng, found = np.random.default_rng(0), []
    layouts = [layout for source in mixture.values() for _, layout in source.layouts if layout.num_tokens <= config.sample_tokens]
    for step in range(NUM_STEPS):
        waiting = [layouts[i] for i in rng.integers(len(layouts), size=64)]
        target = target_flops(mixture, np.array([0.5, 0.5]), costing, config, step=step)
        costs, sizes = np.array([costing.flops(layout, step) for layout in waiting]), pack_sizes(waiting, config, costing, step)
        chosen = choose(costs, sizes, target, pack_bounds(config, costing), rng=rng)
        rows = sum(costing.rows(waiting[i], step) for i in chosen)
        found.append((sum(waiting[i].num_tokens for i in chosen), rows / SHAPE_7B.num_layers))
    return np.array(found)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bound_holds_at_every_moment(policy):
    sizes = sizes_over_the_schedule(POLICIES[policy], pack_tokens=12_000, pack_rows=6_000)
    assert sizes[:, 0].max() <= 12_000 and sizes[:, 1].max() <= 6_000
    # the room is used: in full where everything is kept, and under the route up to one of the bounds
    assert np.maximum(sizes[:, 0] / 12_000, sizes[:, 1] / 6_000).mean() > 0.85


def test_without_a_bound_memory_jumps_at_the_dense_finish():
    rows = sizes_over_the_schedule(POLICIES["shared_bypass"], pack_tokens=8_000)[:, 1]
    assert rows[30:].mean() > 1.4 * rows[10:30].mean()


def test_a_bound_that_does_not_bite_changes_no_pack():
    loose, none = (sizes_over_the_schedule(POLICIES["tread"], pack_tokens=6_000, pack_rows=rows) for rows in (6_000, None))
    assert (loose == none).all()


def test_lanes_keep_the_bound_in_the_routes_they_build(digits_folder, tmp_path):
    """The rows that the built route really has."""
    write_shard(tmp_path / "a.tar", [(str(i), pair(("generation", "understanding")[i % 2], 4)) for i in range(40)])
    policy = {"policy": "random_ltd", "keep_ratio": 0.25}
    places = {
        "run_dir": "unused",
        "vocabulary.text_model": str(digits_folder / "text.model"),
        "data.sources": {"a": {"shards": f"{tmp_path}/a.tar"}},
    }
    route = {"routing.understanding": policy, "routing.generation": policy, "routing.dense_finish_fraction": 0.5}
    bounds = {"data.pack_tokens": 200, "data.pack_rows": 120, "data.num_lanes": 1, "optimizer.num_steps": 40}
    parts = Parts(load_config("digits", TINY | places | route | bounds)).with_mixture()
    lane, held, tokens = parts.make_lane(0), [], []
    for _ in range(40):
        pack, _ = next(lane)
        layers = parts.shape.num_layers
        held.append(sum((stage.end_layer - stage.first_layer) * sum(stage.sequences.lengths) for stage in pack.route.stages) / layers)
        tokens.append(pack.num_tokens)
    assert max(held) <= 120 and min(held) > 80
    assert min(tokens[:20]) > 120 >= max(tokens[20:])


def test_a_sample_longer_than_the_bound_is_over_long(make_factory, tmp_path):
    write_shard(tmp_path / "a.tar", [(str(i), pair("generation", 4 if i == 3 else 2)) for i in range(9)])
    sources = {"a": {"shards": f"{tmp_path}/a.tar"}}
    with pytest.raises(DataError, match="a pack at most 20"):
        list(make_factory(sources, num_lanes=1, pack_tokens=80, pack_rows=20)(0))
