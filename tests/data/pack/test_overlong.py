"""Whatever a sample is made of: under every policy it fits, keeps labels, and loses nothing but ends of texts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megavlm.data.pack.encode import Encoder
from megavlm.data.pack.overlong import encode_within
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.errors import DataError
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.vocabulary import Vocabulary
from tests.data.conftest import pair, write_shard

# words of the model, words that it spells, characters of one to four bytes, blanks, and what decodes to a lone mark
TEXTS = st.lists(st.sampled_from(["seven", "which", "draw", "zebra", "é", "語", "🙂", "\ufffd", " ", "\n"]), max_size=24).map(" ".join)
PARTS = st.one_of(
    st.builds(lambda text, loss: {"text": text, "loss": loss}, TEXTS, st.booleans()),
    st.builds(lambda side, loss: {"side": side, "loss": loss}, st.integers(1, 4), st.booleans()),
)


@pytest.fixture(scope="module")
def vocabulary(digits_folder):
    return Vocabulary(digits_folder / "text.model", 17)


def sample_of(parts, task, index=0):
    images = {f"img{i}": np.zeros((part["side"],) * 2, np.int64) for i, part in enumerate(parts) if "side" in part}
    segments = [
        Segment(image=f"img{i}", loss=part["loss"]) if "side" in part else Segment(text=part["text"], loss=part["loss"])
        for i, part in enumerate(parts)
    ]
    return Sample("k", task, tuple(segments), images, Coordinates(0, 0, 0, index))


def teaches(encoded) -> bool:
    return bool(encoded.has_loss[:-1].any())


@pytest.fixture(scope="module")
def check(vocabulary):
    def check(parts, task, max_tokens, ratio, policy):
        encoder = Encoder(vocabulary, PixelTokenizer(17, 8, 8), ratio, seed=1)
        sample = sample_of(parts, task)
        whole = encoder(sample)
        try:
            made, action = encode_within(sample, encoder, max_tokens, policy)
        except DataError:
            assert_cannot_fit(whole, encoder.runs(sample), max_tokens, policy)
            return
        assert all(piece.num_tokens <= max_tokens and teaches(piece) for piece in made)
        assert made or policy == "skip"
        assert (action is None) == (whole.num_tokens <= max_tokens)
        if action == "truncated":
            assert_only_ends_are_gone(encoder.runs(sample), made[0], vocabulary)
        if action == "split":
            labels = [token for piece in made for token in piece.tokens[:-1][piece.has_loss[:-1]]]
            assert labels == whole.tokens[:-1][whole.has_loss[:-1]].tolist()

    return check


def assert_cannot_fit(whole, runs, max_tokens, policy):
    if not teaches(whole):
        return
    assert policy != "skip" and whole.num_tokens > max_tokens
    if policy == "truncate_text":
        # a character that shows is at most a blank and four bytes
        assert 2 + sum(len(run.ids) if run.grid else min(len(run.ids), 8) for run in runs) > max_tokens
    if policy == "split_images":
        cuts = [0, *(i for i, run in enumerate(runs) if run.grid and i), len(runs)]
        assert any(2 + sum(len(run.ids) for run in runs[a:b]) > max_tokens for a, b in pairwise(cuts))


def assert_only_ends_are_gone(runs, made, vocabulary):
    """Every run begins where the last one ended, and is what it was, or the beginning of it."""
    tokens, has_loss = made.tokens.tolist()[1:-1], made.has_loss.tolist()[1:-1]
    # what is kept of each run, from the last one backwards, is the longest beginning that ends there
    places = {0}
    for run in runs:
        ids = list(run.ids)
        lengths = [len(ids)] if run.grid or not ids else range(1, len(ids) + 1)
        places = {
            place + n
            for place in places
            for n in lengths
            if tokens[place : place + n] == ids[:n] and has_loss[place : place + n] == [run.has_loss] * n
        }
    assert len(tokens) in places


PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("policy", ["error", "skip", "truncate_text", "split_images"])
def test_samples_fit_and_keep_labels(check, policy):
    tasks, ratios = st.sampled_from(["text", "understanding", "generation"]), st.sampled_from([0.0, 0.5, 1.0])

    @PROPERTY
    @given(st.lists(PARTS, min_size=1, max_size=6), tasks, st.integers(6, 80), ratios)
    def run(parts, task, max_tokens, ratio):
        check(parts, task, max_tokens, ratio, policy)

    run()


def test_text_that_unconditional_replaced_is_not_saved_again(vocabulary):
    """Its length was counted, so that the sample that was made was longer than a pack."""
    parts = [{"text": "seven " * 400, "loss": False}, {"side": 4, "loss": True}, {"text": "zebra " * 40, "loss": True}]
    encoder = Encoder(vocabulary, PixelTokenizer(17, 8, 8), 1.0)
    (made,), action = encode_within(sample_of(parts, "generation"), encoder, 60, "truncate_text")
    assert action == "truncated" and made.num_tokens == 60
    assert vocabulary.unconditional in made.tokens


@pytest.mark.parametrize("character", ["🙂", "語", "é"])
def test_no_character_is_cut(vocabulary, character):
    encoder = Encoder(vocabulary, PixelTokenizer(17, 8, 8))
    for max_tokens in range(12, 40):
        sample = sample_of([{"text": character * 30, "loss": True}], "text")
        (made,), _ = encode_within(sample, encoder, max_tokens, "truncate_text")
        text = vocabulary.decode_text(made.tokens.tolist())
        assert text and set(text) == {character} and made.num_tokens > max_tokens - 5


@pytest.mark.parametrize("policy", ["error", "skip", "truncate_text", "split_images"])
@pytest.mark.parametrize("text", ["", " ", " \n"])
def test_labels_that_are_empty_are_refused(vocabulary, text, policy):
    parts = [{"text": "seven", "loss": False}, {"text": text, "loss": True}]
    with pytest.raises(DataError, match="nothing to learn"):
        encode_within(sample_of(parts, "understanding"), Encoder(vocabulary, PixelTokenizer(17, 8, 8)), 50, policy)


def test_packs_of_truncated_samples_keep_their_bound(make_factory, tmp_path):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(60):
        prompt, words = (" ".join(rng.choice(["seven", "zebra", "語", "🙂"], int(rng.integers(1, 60)))) for _ in range(2))
        segments = [{"text": prompt}, {"image": "img0", "loss": True}, {"text": words, "loss": True}]
        samples.append((str(i), pair("generation", 4) | {"json": {"task": "generation", "segments": segments}}))
    write_shard(tmp_path / "a.tar", samples)
    settings = {"over_long": "truncate_text", "num_lanes": 1, "pack_tokens": 60, "unconditional_ratio": 0.5}
    lane = make_factory({"a": {"shards": str(tmp_path / "a.tar")}}, **settings)(0)
    for pack in (next(lane)[0] for _ in range(150)):
        assert pack.num_tokens <= 60
        of_sample = np.searchsorted(pack.sequences.cu_seqlens[1:].numpy(), pack.rows_M.numpy(), side="right")
        assert set(of_sample) == set(range(len(pack.tasks))), "a sample without labels"
