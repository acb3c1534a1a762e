"""P1 and P2: the same packs however many processes, workers and interruptions; every sample once per epoch."""

import json
from collections import Counter

import numpy as np
import pytest

from megavlm.data.pack.cursor import deal
from megavlm.data.pack.loader import Loader, lanes_of
from megavlm.data.read.shards import expand_shards, read_shard
from megavlm.errors import ConfigError, DataError
from tests.data.conftest import factory_of, ids, pair, write_shard

NUM_LANES = 64


def steps_of(factory, lanes, num_steps, states=None, num_workers=0):
    """What a rank sees: per step the ids of its packs, and the states after each."""
    loader = Loader(factory, lanes, states or {}, num_workers, prefetch_packs=4, pin_memory=False)
    seen, after = [], []
    for _ in range(num_steps):
        packs, states = next(loader)
        assert [pack.lane for pack in packs] == lanes
        seen.append({pack.lane: (ids(pack), pack.tokens_T.tolist()) for pack in packs})
        after.append(json.loads(json.dumps(states, default=str), object_hook=_integer_keys))
    return seen, after


def _integer_keys(document):
    return {int(key) if key.isdigit() else key: value for key, value in document.items()}


@pytest.fixture(scope="module")
def factory(corpus_sources, digits_folder):
    return factory_of(digits_folder, corpus_sources, num_lanes=NUM_LANES)


@pytest.fixture(scope="module")
def reference(factory):
    return steps_of(factory, list(range(NUM_LANES)), 5)[0]


def test_worlds_and_interruptions_at_random_points_give_the_same_packs(factory, reference):
    """P1 without workers: 64 lanes, five world sizes, another one after every interruption."""
    rng, states, step = np.random.default_rng(1), {}, 0
    worlds = [1, 2, 4, 8, 64]
    for world in [*rng.permutation(worlds).tolist(), *rng.permutation(worlds).tolist()]:
        num_steps = int(rng.integers(1, 3))
        if step + num_steps > len(reference):
            step, states = 0, {}
        all_states = [{} for _ in range(num_steps)]
        for rank in range(world):
            lanes = lanes_of(rank, world, NUM_LANES)
            seen, after = steps_of(factory, lanes, num_steps, {lane: states[lane] for lane in lanes if states})
            for s in range(num_steps):
                assert seen[s] == {lane: reference[step + s][lane] for lane in lanes}, (world, rank, step + s)
                all_states[s] |= after[s]
        # interrupted after any of the steps: what was prefetched since is forgotten
        stop = int(rng.integers(num_steps))
        step, states = step + stop + 1, all_states[stop]


@pytest.mark.parametrize(("world", "num_workers"), [(1, 1), (2, 3)])
def test_workers_give_the_same_packs(factory, reference, world, num_workers):
    """P1 with worker processes, also where they do not divide the lanes; one rank of the world, interrupted once."""
    rank = np.random.default_rng(world).integers(world)
    lanes = lanes_of(int(rank), world, NUM_LANES)
    seen, after = steps_of(factory, lanes, 2, num_workers=num_workers)
    more, _ = steps_of(factory, lanes, 2, after[0])
    wanted = [{lane: step[lane] for lane in lanes} for step in reference]
    assert seen == wanted[:2] and more == wanted[1:3]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_world_with_every_number_of_workers(factory, reference, world, num_workers):
    test_workers_give_the_same_packs(factory, reference, world, num_workers)


def test_each_epoch_is_covered_exactly_once(make_factory, corpus_sources):
    """P2 over 64 lanes, for shards that are sliced and shards that are dealt whole, over two epochs."""
    sources = {name: source | {"epochs": 2} for name, source in corpus_sources.items()}
    factory = make_factory(sources, num_lanes=NUM_LANES)
    seen = Counter(place for lane in range(NUM_LANES) for pack, _ in factory(lane) for place in ids(pack))
    wanted = {
        (number, epoch, shard, index, 0)
        for number, (name, source) in enumerate(sources.items())
        for epoch in range(2)
        for shard, url in enumerate(expand_shards(name, source["shards"]))
        for index, _ in enumerate(read_shard(url))
    }
    assert set(seen) == wanted and set(seen.values()) == {1}


def test_lanes_of_finite_sources_end_one_by_one(make_factory, corpus_sources):
    factory = make_factory({"generation": corpus_sources["generation"] | {"epochs": 1}}, num_lanes=4)
    steps = list(Loader(factory, [0, 1, 2, 3], {}, 0, prefetch_packs=4, pin_memory=False))
    alone = {lane: [ids(pack) for pack, _ in factory(lane)] for lane in range(4)}
    together = {lane: [ids(pack) for packs, _ in steps for pack in packs if pack.lane == lane] for lane in range(4)}
    assert together == alone and len(steps) == max(map(len, alone.values()))


@pytest.mark.parametrize("weights", ["samples", "tokens"])
def test_weights_share_out_samples_or_tokens(make_factory, corpus_sources, weights):
    lane = make_factory(corpus_sources, weights=weights, num_lanes=1)(0)
    counted = np.zeros(2)
    for _ in range(150):
        pack, _ = next(lane)
        counted += [
            sum(
                1 if weights == "samples" else length
                for place, length in zip(pack.coordinates, pack.sequences.lengths)
                if place.source == n
            )
            for n in range(2)
        ]
    assert counted[1] / counted[0] == pytest.approx(1.5, rel=0.06)


def test_temperature_evens_weights_out(make_factory, corpus_sources):
    plain = make_factory(corpus_sources, weights="tokens")(0).shares
    even = make_factory(corpus_sources, weights="tokens", temperature=2)(0).shares
    assert plain[1] / plain[0] == pytest.approx(1.5) and even[1] / even[0] == pytest.approx(1.5**0.5)


def test_repeat_needs_sizes_and_counts_by_them(make_factory, tmp_path):
    from megavlm.data.read.index import write_index

    for name, size in (("a", 10), ("b", 30)):
        write_shard(tmp_path / f"{name}.tar", [(str(i), pair("understanding", 2)) for i in range(size)])
    sources = {"a": {"shards": f"{tmp_path}/a.tar", "repeat": 2}, "b": {"shards": f"{tmp_path}/b.tar", "repeat": 1}}
    with pytest.raises(ConfigError, match="the number of its samples is not known"):
        make_factory(sources)(0)
    assert write_index(tmp_path / "a.tar").samples == 10
    write_index(tmp_path / "b.tar")
    assert make_factory(sources)(0).shares.tolist() == pytest.approx([0.4, 0.6])


def test_no_sample_waits_longer_than_the_look_ahead(make_factory, corpus_sources):
    factory = make_factory(corpus_sources, num_lanes=1, look_ahead_samples=12)
    lane, before = factory(0), []
    waited = Counter()
    for _ in range(200):
        _pack, state = next(lane)
        before = [tuple(place) for place in state["waiting"]]
        waited = Counter({place: waited[place] + 1 for place in before})
        assert max(waited.values()) < 12


def test_reading_again_is_the_look_ahead_and_the_heads(make_factory, corpus_sources):
    factory = make_factory(corpus_sources, num_lanes=2)
    lane = factory(0)
    for _ in range(40):
        _, state = next(lane)
    again = factory(0, state)
    heads = sum(entry["cursor"][2] for entry in state["sources"].values())
    assert again.read_again["heads"] == heads <= 140 + 12
    # each shard with a waiting sample is read up to the last of them
    shards = {(place[0], place[2]) for place in state["waiting"]}
    assert len(state["waiting"]) <= again.read_again["look_ahead"] <= 140 * len(shards)


def test_bad_samples_are_counted_and_passed_over_up_to_a_limit(make_factory, tmp_path):
    samples = [(str(i), pair("generation", 2) if i % 3 else {"json": b"{"}) for i in range(9)]
    write_shard(tmp_path / "a.tar", samples)
    sources = {"a": {"shards": f"{tmp_path}/a.tar", "epochs": 1}}
    packs = list(make_factory(sources, max_errors=3, num_lanes=1)(0))
    assert packs[-1][1]["counts"]["errors"] == 3
    assert sorted(place[3] for pack, _ in packs for place in ids(pack)) == [1, 2, 4, 5, 7, 8]
    with pytest.raises(DataError) as caught:
        list(make_factory(sources, max_errors=2, num_lanes=1)(0))
    assert caught.value.source == "a" and caught.value.shard.endswith("a.tar") and caught.value.key == "6"


def test_errors_of_workers_arrive_as_they_are(make_factory, tmp_path):
    write_shard(tmp_path / "a.tar", [("0", pair("generation", 2)), ("1", {"json": b"{"})])
    loader = Loader(make_factory({"a": {"shards": f"{tmp_path}/a.tar"}}, num_lanes=1), [0], {}, 1, prefetch_packs=1, pin_memory=False)
    with pytest.raises(DataError, match="broken JSON"):
        next(loader)


# --- sources that changed since the checkpoint


@pytest.fixture
def three_sources(tmp_path):
    for name in "abcd":
        write_shard(tmp_path / f"{name}.tar", [(f"{name}{i}", pair("generation", 2)) for i in range(40)])
    return {name: {"shards": f"{tmp_path}/{name}.tar"} for name in "abcd"}


def state_after(factory, num_packs):
    lane = factory(0)
    for _ in range(num_packs):
        _, state = next(lane)
    return state


CHANGES = {
    "added": (["a", "b"], ["a", "b", "c"], {"allow_add", "allow_add_remove", "warn"}),
    "removed": (["a", "b"], ["b"], {"allow_add_remove", "warn"}),
    "swapped": (["a", "b"], ["b", "a"], {"strict", "allow_add", "allow_add_remove", "warn"}),
}


@pytest.mark.parametrize("policy", ["strict", "allow_add", "allow_add_remove", "warn"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_sources_are_refused_or_accounted_for(make_factory, three_sources, change, policy, caplog):
    before, after, allowing = CHANGES[change]
    state = state_after(make_factory({n: three_sources[n] for n in before}, num_lanes=1), 2)
    factory = make_factory({n: three_sources[n] for n in after}, num_lanes=1, when_sources_change=policy)
    if policy not in allowing:
        with pytest.raises(ConfigError, match=f"{change}: [ac]"):
            factory(0, state)
        return
    lane = factory(0, state)
    assert (f"{change}: " in caplog.text) == (change != "swapped")
    saved = [(before[p[0]], *p[1:]) for p in state["waiting"] if before[p[0]] in after]
    assert [(after[w.coordinates.source], *w.coordinates[1:]) for w in lane.waiting] == saved
    # those that stayed go on where they were: nothing of an epoch is seen twice
    pack_ids = [(after[i[0]], *i[1:]) for _ in range(3) for i in ids(next(lane)[0])]
    ended = {name: state["sources"][name]["cursor"] for name in before}
    fresh = [i for i in pack_ids if i not in saved and i[0] in before]
    assert all((i[1], i[3]) >= (ended[i[0]][0], ended[i[0]][2]) for i in fresh)


def test_other_shards_under_the_same_name_begin_anew_only_under_warn(make_factory, three_sources):
    state = state_after(make_factory({n: three_sources[n] for n in "ab"}, num_lanes=1), 2)
    changed = {"a": three_sources["a"], "b": three_sources["d"]}
    with pytest.raises(ConfigError, match="changed: b"):
        make_factory(changed, num_lanes=1, when_sources_change="allow_add_remove")(0, state)
    lane = make_factory(changed, num_lanes=1, when_sources_change="warn")(0, state)
    assert lane.cursors[1].state == [0, 0, 0] and all(w.coordinates.source == 0 for w in lane.waiting)


def test_a_source_that_has_ended_stays_so_when_the_lane_goes_on(make_factory, corpus_sources):
    """P10: what is aimed at depends on which sources are left."""
    sources = corpus_sources | {"generation": corpus_sources["generation"] | {"epochs": 1}}
    factory = make_factory(sources, num_lanes=4)
    lane = factory(0)
    while not lane.state()["sources"]["generation"]["finished"]:
        next(lane)
    resumed = factory(0, lane.state())
    assert resumed.state() == lane.state()
    assert [ids(next(resumed)[0]) for _ in range(5)] == [ids(next(lane)[0]) for _ in range(5)]


def test_slices_of_a_shard_rotate_with_the_epochs():
    """Four lanes share two shards, each half of one: over two epochs a lane does not meet the same half of a shard again."""
    for lane in range(4):
        parts = [deal(2, lane, 4, seed, source_key=0, epoch=epoch) for seed in range(20) for epoch in (0, 1)]
        assert all(len(part) == 1 and part[0][2] == 2 for part in parts)
        assert all(first[0][1] != second[0][1] for first, second in zip(parts[::2], parts[1::2]))
