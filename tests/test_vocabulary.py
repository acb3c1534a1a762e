"""Text of a pretrained model keeps its ids; specials and codes come after its rows."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megavlm.errors import ConfigError
from megavlm.parts.export import export
from megavlm.parts.parts import Parts
from megavlm.training.initial import grown, load_initial_weights
from megavlm.vocabulary import Vocabulary
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train

ROWS = 320
"""Of the pretrained embedding: more than the tokenizer has pieces."""
FIELDS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A Llama with random weights and a byte-level tokenizer of its own, as folders on the hub have them."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a handwritten seven", "Draw the digit four."] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**FIELDS, vocab_size=ROWS, eos_token_id=0, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def test_ids_of_the_text_stay_and_the_rest_comes_after_the_rows(pretrained):
    vocabulary = Vocabulary(pretrained, 17)
    tokenizer = tokenizers.Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    for text in ("a handwritten seven", "Größe 字 \n two  spaces", ""):
        assert vocabulary.encode_text(text) == tokenizer.encode(text).ids
        assert vocabulary.decode_text([*vocabulary.encode_text(text), vocabulary.eos, vocabulary.first_code]) == text
    assert tokenizer.get_vocab_size() < ROWS
    assert (vocabulary.num_text, vocabulary.bos, vocabulary.first_code, vocabulary.size) == (ROWS, ROWS, ROWS + 5, ROWS + 5 + 17)
    ids = vocabulary.encode_image(np.array([[0, 16]]))
    assert ids[0] == vocabulary.boi and ids[-1] == vocabulary.eoi and vocabulary.decode_codes(ids[1:-1]).tolist() == [0, 16]


def test_nothing_in_a_text_becomes_a_special_token(pretrained):
    vocabulary = Vocabulary(pretrained, 17)
    ids = vocabulary.encode_text("look: <|end|>")
    assert 0 not in ids and vocabulary.decode_text(ids) == "look: <|end|>"
    assert vocabulary.decode_text([0, ROWS - 1]) == ""


def test_what_a_tokenizer_file_says_of_other_uses_is_not_obeyed(pretrained, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    text = "a handwritten seven and the digit four"
    expected = tokenizer.encode(text).ids
    tokenizer.model.dropout = 0.9
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    frame = {"single": "<|end|> $A <|end|>", "special_tokens": [("<|end|>", 0)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**frame)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(tmp_path, 17)
    assert vocabulary.encode_text(text) == expected == vocabulary.encode_text(text)
    assert vocabulary.encode_text("") == [] and vocabulary.decode_text(expected) == text


def test_tokenizer_and_configuration_must_agree(pretrained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((pretrained / "tokenizer.json").read_bytes())
    pieces = Vocabulary(tmp_path, 17).num_text
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": pieces - 1}))
    with pytest.raises(ConfigError, match=f"has {pieces} pieces, but its config.json says vocab_size {pieces - 1}"):
        Vocabulary(tmp_path, 17)
    with pytest.raises(ConfigError, match="no SentencePiece model at"):
        Vocabulary(tmp_path / "nothing", 17)


def test_new_rows_are_the_mean_of_the_old_ones_with_a_little_noise():
    old = 3 + torch.randn(500, 16)
    new = grown(old, 2500)
    assert new[:500].equal(old) and new.equal(grown(old, 2500))
    torch.testing.assert_close(new[500:].mean(0), old.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(new[500:].std(0), 0.1 * old.std(0), rtol=0.1, atol=0)


def test_a_run_begins_with_a_pretrained_folder_and_keeps_its_tokenizer(pretrained, make_config, tmp_path):
    settings = {
        "model.architecture": str(pretrained), "vocabulary.text_model": str(pretrained), "init_from": str(pretrained),
        "optimizer.learning_rate": 1e-30, "checkpoint.every_steps": 1,
    }  # fmt: skip
    config = make_config(settings)
    assert config.model.architecture["model_type"] == "llama" and "vocab_size" not in config.model.architecture
    vocabulary = Parts(config).vocabulary
    causal_lm = Parts(config).make_causal_lm()
    load_initial_weights(str(pretrained), causal_lm, vocabulary)
    original = LlamaForCausalLM.from_pretrained(pretrained).eval()
    ids = torch.tensor([vocabulary.encode_text("Draw a handwritten seven and the digit four.")])
    with torch.no_grad():
        logits = causal_lm.eval()(ids).logits
        assert logits.shape[-1] == ROWS + 5 + 17
        torch.testing.assert_close(logits[..., :ROWS], original(ids).logits, rtol=1e-5, atol=1e-6)
        assert logits[..., ROWS:].amax() < original(ids).logits.amax(), "no new token outdoes the old ones"
    run_ranks(1, train, config, 1)
    copy = tmp_path / "run" / "text.model"
    assert Vocabulary(copy, 17).size == vocabulary.size
    export(tmp_path / "run", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_tied_head_grows_with_the_embedding(pretrained, make_config, tmp_path):
    tied = {"model_type": "llama", "tie_word_embeddings": True, **FIELDS}
    LlamaForCausalLM(LlamaConfig(**FIELDS, vocab_size=ROWS, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "tokenizer.json").write_bytes((pretrained / "tokenizer.json").read_bytes())
    config = make_config({"model.architecture": tied, "vocabulary.text_model": str(tmp_path / "tied")})
    vocabulary = Parts(config).vocabulary
    causal_lm = Parts(config).make_causal_lm()
    load_initial_weights(str(tmp_path / "tied"), causal_lm, vocabulary)
    old = LlamaForCausalLM.from_pretrained(tmp_path / "tied").model.embed_tokens.weight
    assert causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight and len(causal_lm.lm_head.weight) == vocabulary.size
    assert causal_lm.lm_head.weight[:ROWS].equal(old) and causal_lm.lm_head.weight[ROWS:].std() < 0.2 * old.std()


def test_rows_of_another_tokenizer_are_not_mixed_up(pretrained, make_config, digits_folder):
    config = make_config({"model.architecture": str(pretrained), "vocabulary.text_model": str(digits_folder / "text.model")})
    vocabulary = Parts(config).vocabulary
    with pytest.raises(ConfigError, match="do not fit this model(.|\n)*give its folder as model.architecture and vocabulary.text_model"):
        load_initial_weights(str(pretrained), Parts(config).make_causal_lm(), vocabulary)
    with pytest.raises(ConfigError, match="neither a mapping nor a folder with config.json"):
        make_config({"model.architecture": str(digits_folder)})
