"""A lane that goes on with other settings: nothing is seen twice, and what is not seen is counted."""

from collections import Counter
from functools import partial

import pytest

from megavlm.data.pack.lane import Lane
from megavlm.errors import DataError
from tests.data.conftest import ids, npy, pair, write_shard

IMAGE = [[1] * 4] * 4
NUM_DOCUMENTS, NUM_DRAWINGS = 12, 24
NUM_SAMPLES = NUM_DOCUMENTS + NUM_DRAWINGS


def document(number: int) -> dict:
    """One to six images, each with a text of its own to learn; some are longer than a pack."""
    segments, members = [], {}
    for i in range(number % 6 + 1):
        members[f"img{i}.npy"] = npy(IMAGE)
        segments += [{"image": f"img{i}"}, {"text": "zero " * (number % 7)}, {"text": f"{number} {i}", "loss": True}]
    return members | {"json": {"task": "understanding", "segments": segments}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    write_shard(folder / "documents.tar", [(str(i), document(i)) for i in range(NUM_DOCUMENTS)])
    write_shard(folder / "drawings.tar", [(str(i), pair("generation", 3, "one two " * (i % 9))) for i in range(NUM_DRAWINGS)])
    return {name: {"shards": f"{folder}/{name}.tar", "epochs": 1} for name in ("documents", "drawings")}


def interrupted(make_factory, sources, before: dict, after: dict, num_packs: int) -> tuple[list, Lane]:
    """The packs of a lane of which the first ones had other settings, and the second lane."""
    first = make_factory(sources, **SETTINGS | before)(0)
    packs = [next(first)[0] for _ in range(num_packs)]
    second = make_factory(sources, **SETTINGS | after)(0, first.state())
    bound = (SETTINGS | after)["pack_tokens"]
    rest = [pack for pack, _ in second]
    assert all(pack.num_tokens <= bound for pack in rest)
    return packs + rest, second


SETTINGS = {"pack_tokens": 70, "over_long": "split_images", "num_lanes": 1, "look_ahead_samples": 8, "max_errors": 1000}
CHANGES = {
    "nothing": {},
    "shorter packs": {"pack_tokens": 46},
    "a little shorter": {"pack_tokens": 69},
    "longer packs": {"pack_tokens": 200},
    "skip": {"over_long": "skip"},
    "error": {"over_long": "error"},
    "truncate": {"over_long": "truncate_text"},
    "shorter and truncate": {"over_long": "truncate_text", "pack_tokens": 40},
    "every prompt dropped": {"unconditional_ratio": 1.0},
    "no prompt dropped": {"unconditional_ratio": 0.0},
    "smaller look-ahead": {"look_ahead_samples": 2},
    "larger look-ahead": {"look_ahead_samples": 100},
    "fill": {"fill": 0.5},
    "temperature": {"temperature": 5.0},
    "weights": {"weights": "tokens"},
    "mixture": {"mixture_samples": 3},
}


@pytest.mark.parametrize("before", ["nothing", "truncate", "every prompt dropped"])
@pytest.mark.parametrize("after", CHANGES)
def test_going_on_with_other_settings(make_factory, sources, before, after):
    packs, second = interrupted(make_factory, sources, CHANGES[before], CHANGES[after], 5)
    seen = Counter(place for pack in packs for place in ids(pack))
    assert max(seen.values()) == 1
    lost = second.counts["skipped"] + second.counts["errors"]
    assert NUM_SAMPLES - len({place[:4] for place in seen}) <= lost
    if before == after:
        straight = make_factory(sources, **SETTINGS | CHANGES[before])(0)
        assert sorted(place for pack, _ in straight for place in ids(pack)) == sorted(seen)
        assert straight.counts == second.counts


def learned_texts(packs, decode) -> dict[int, str]:
    """What was learned of each document: its texts say the document's number and their own."""
    texts = {}
    for pack in packs:
        tokens, rows, bounds = pack.tokens_T.tolist(), pack.rows_M.tolist(), pack.sequences.cu_seqlens.tolist()
        for (source, _, _, index, _), begin, end in zip(ids(pack), bounds, bounds[1:]):
            if source == 0:
                text = decode([tokens[row + 1] for row in rows if begin <= row < end - 1])
                texts[index] = texts.get(index, "") + text.replace(" ", "")
    return texts


@pytest.mark.parametrize("after", ["nothing", "shorter packs", "a little shorter", "longer packs", "skip", "truncate"])
def test_no_text_of_a_split_document_is_learned_twice(make_factory, sources, after):
    given_up = 0
    for num_packs in range(1, 9):
        packs, second = interrupted(make_factory, sources, {}, CHANGES[after], num_packs)
        given_up += second.counts["skipped"]
        for index, text in learned_texts(packs, second.encoder.vocabulary.decode_text).items():
            whole = Counter("".join(f"{index}{i}" for i in range(index % 6 + 1)))
            assert not Counter(text) - whole
            assert after != "nothing" or Counter(text) == whole
    assert bool(given_up) == (after not in ("nothing", "a little shorter"))


def state_after(make_factory, sources, num_packs, **settings) -> dict:
    lane = make_factory(sources, **SETTINGS | settings)(0)
    for _ in range(num_packs):
        next(lane)
    return lane.state()


def test_what_no_longer_fits_is_an_error_with_its_place(make_factory, sources):
    state = state_after(make_factory, sources, 2, pack_tokens=200, over_long="error")
    with pytest.raises(DataError, match="a pack at most 30") as caught:
        make_factory(sources, **SETTINGS | {"pack_tokens": 30, "over_long": "error", "max_errors": 0})(0, state)
    assert caught.value.source and caught.value.shard.endswith(".tar") and caught.value.key


def test_states_of_an_earlier_megavlm(make_factory, sources):
    lane = make_factory(sources, **SETTINGS)(0)
    for _ in range(4):
        next(lane)
    state = lane.state()
    del state["pieces"]
    again = make_factory(sources, **SETTINGS)(0, state)
    assert [ids(pack) for pack, _ in again] == [ids(pack) for pack, _ in lane]


@pytest.mark.parametrize("max_errors", [0, 1])
def test_a_shard_that_has_become_shorter(make_factory, tmp_path, max_errors):
    samples = [(str(i), pair("generation", 2)) for i in range(20)]
    write_shard(tmp_path / "a.tar", samples)
    sources = {"a": {"shards": f"{tmp_path}/a.tar"}}
    state = state_after(make_factory, sources, 1)
    write_shard(tmp_path / "a.tar", samples[:3])
    make = partial(make_factory(sources, **SETTINGS | {"max_errors": max_errors}), 0, state)
    if max_errors:
        assert make().counts["errors"] == 1 and next(make())
        return
    with pytest.raises(DataError, match="the shard has 3 samples, and sample [0-9]+ was read from it before") as caught:
        make()
    assert caught.value.source == "a" and caught.value.shard.endswith("a.tar")


def test_a_source_that_had_ended_goes_on_when_it_has_more_epochs(make_factory, sources):
    lane = make_factory(sources, **SETTINGS)(0)
    for _ in lane:
        pass
    more = {name: source | {"epochs": 2} for name, source in sources.items()}
    second = make_factory(more, **SETTINGS)(0, lane.state())
    places = [place for pack, _ in second for place in ids(pack)]
    assert {place[1] for place in places} == {1} and len({place[:4] for place in places}) == NUM_SAMPLES


@pytest.mark.parametrize("change", [{"generation_ratio": 0.1}, {"caption_requests": ["Why?"]}, {"weight": 7.0}])
def test_other_settings_of_a_source(make_factory, sources, change):
    """They hold from the look-ahead on."""
    state = state_after(make_factory, sources, 2)
    second = make_factory({name: source | change for name, source in sources.items()}, **SETTINGS)(0, state)
    places = [place for pack, _ in second for place in ids(pack)]
    assert len(places) == len(set(places)) and set(map(tuple, state["waiting"])) <= set(places)
