"""No text is left out of a text model without a word: long ones, those with characters that SentencePiece skips, empty ones."""

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megavlm.errors import DataError
from megavlm.vocabulary import SENTENCE_BYTES, _parts, train_text_model

BASE = ["one two three four five"] * 20


def pieces(path) -> set[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {model.id_to_piece(i) for i in range(model.vocab_size())}


@pytest.mark.parametrize("text", ["xylophone " * 500, "xylophone\n" * 500, "xylophone ▅ " * 20, "xylophone \0 " * 20, "xylophone " * 20])
def test_every_text_counts(tmp_path, text):
    counts = train_text_model([*BASE, text, "", " \n"], tmp_path / "text.model", 400)
    assert any("xylophone" in piece for piece in pieces(tmp_path / "text.model"))
    assert (counts.texts, counts.empty, counts.divided) == (21, 2, int(len(text) > SENTENCE_BYTES))


@given(st.text(st.sampled_from("aé語🙂 "), max_size=50), st.integers(1, 400))
def test_parts_are_the_text_and_fit(text, times):
    parts = list(_parts(text * times))
    assert "".join(parts) == text * times and all(len(part.encode()) <= SENTENCE_BYTES for part in parts)


def test_what_reading_raises_arrives_as_it_is(tmp_path):
    def texts():
        yield from BASE
        raise DataError("broken", "mend it")

    with pytest.raises(DataError, match="broken"):
        train_text_model(texts(), tmp_path / "text.model", 400)
    assert not (tmp_path / "text.model").exists()
