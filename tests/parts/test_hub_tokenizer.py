"""What AutoTokenizer loads from an export alone gives the run's ids, or it does not load at all."""

import json

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from megavlm.parts.hub_tokenizer import texts_of_every_kind, write_tokenizer
from megavlm.vocabulary import Vocabulary, train_text_model

CODES = 19
TEXTS = ["Draw the digit four.", "  two  spaces \t\n and more  ", "Größe 字 Ǆ ﬁ ½ ™ 👩‍🚀", "<unk> <0x41> </s>", "e\u0301 is é", "▁ _", ""]


def loaded(vocabulary, folder):
    """The tokenizer of a folder with nothing but an export's files."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    write_tokenizer(vocabulary, folder)
    return AutoTokenizer.from_pretrained(folder)


def assert_same(vocabulary, tokenizer, texts):
    for text in texts:
        ids = vocabulary.encode_text(text)
        assert tokenizer(text, add_special_tokens=True)["input_ids"] == ids, text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == vocabulary.decode_text(ids)
    image = ["<boi>", *(f"<code_{i:05}>" for i in range(CODES)), "<eoi>"]
    ids = [vocabulary.boi, *range(vocabulary.first_code, vocabulary.size), vocabulary.eoi]
    assert tokenizer.convert_tokens_to_ids(image) == ids
    assert tokenizer("".join(image))["input_ids"][-len(ids) :] == ids
    assert len(tokenizer) == vocabulary.size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vocabulary.bos, vocabulary.eos)
    assert tokenizer.decode([*vocabulary.encode_text("four"), vocabulary.eos, *ids], skip_special_tokens=True).strip() == "four"


@pytest.mark.parametrize("wide", [False, True], ids=["few characters", "many characters"])
def test_a_sentencepiece_model(tmp_path, wide):
    corpus = ["a handwritten seven", "Draw the digit four.", "What is in this picture? A red circle, left of a blue one."] * 20
    corpus += [text for text in texts_of_every_kind(["and", "▁or"]) if text.strip()][:1500] if wide else []
    train_text_model(corpus, tmp_path / "text.model", 2300 if wide else 330)
    vocabulary = Vocabulary(tmp_path / "text.model", CODES)
    pieces = [vocabulary.text._model.id_to_piece(i) for i in range(vocabulary.num_text)]
    assert_same(vocabulary, loaded(vocabulary, tmp_path), TEXTS + corpus[:60] + texts_of_every_kind(pieces)[::37])


@pytest.mark.parametrize("own_specials", [(), ("<bos>", "<eos>")])
def test_a_pretrained_tokenizer_with_a_padded_embedding(tmp_path, own_specials):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|end|>", *own_specials]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a handwritten seven", "Draw the digit four."] * 9, trainer)
    tokenizer.enable_truncation(3)
    (tmp_path / "text").mkdir()
    tokenizer.save(str(tmp_path / "text" / "tokenizer.json"))
    (tmp_path / "text" / "config.json").write_text(json.dumps({"vocab_size": 320}))
    vocabulary = Vocabulary(tmp_path / "text", CODES)
    assert vocabulary.num_text == 320
    assert_same(vocabulary, loaded(vocabulary, tmp_path), TEXTS)


@pytest.mark.parametrize("options", [{"model_type": "bpe"}, {"user_defined_symbols": ["igi"]}])
def test_what_has_no_equal_does_not_load(tmp_path, options):
    corpus = ["a handwritten seven", "Draw the digit four.", "the d the digit"] * 20
    size = {"vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "text"), minloglevel=2, **size, **options
    )
    vocabulary = Vocabulary(tmp_path / "text.model", CODES)
    assert "no tokenizer for AutoTokenizer" in write_tokenizer(vocabulary, tmp_path)
    with pytest.raises(Exception, match="SeeVocabularyJson|tokenizer"):
        loaded(vocabulary, tmp_path)
