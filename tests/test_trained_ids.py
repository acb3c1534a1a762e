"""A model that draws already, laid out like Liquid: a Gemma whose tokenizer has special tokens for images, and codes behind the text."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GemmaForCausalLM

from megavlm.errors import ConfigError
from megavlm.evaluation.prompts import to_draw, to_read
from megavlm.evaluation.sampling import stream_tokens
from megavlm.parts.export import export
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_trained
from megavlm.training.initial import load_initial_weights
from megavlm.vocabulary import SPECIALS, TrainedIds, Vocabulary
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train

TEXT, CODES, ROWS = 320, 17, 344
"""Ids of the text, which codes follow; some rows of the embedding come after them."""
NAMES = ["<pad>", "<eos>", "<bos>", "<unk>", "<unconditional>", "<boi>", "<eoi>"]
FIELDS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def liquid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("liquid")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=TEXT, special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a handwritten seven", "Which digit is this? Draw the digit four."] * 9, trainer)
    tokenizer.add_special_tokens([f"<unused{i}>" for i in range(TEXT - tokenizer.get_vocab_size())])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = GemmaConfig(**FIELDS, vocab_size=ROWS, bos_token_id=2, eos_token_id=1, pad_token_id=0, initializer_range=0.4)
    GemmaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config(liquid, make_config, tmp_path):
    settings = {
        "model.architecture": str(liquid), "vocabulary.text_model": str(liquid), "vocabulary.trained_ids": {"first_code": TEXT},
        "init_from": str(liquid), "optimizer.learning_rate": 1e-30, "checkpoint.every_steps": 1,
    }  # fmt: skip
    return make_config(settings, tmp_path / "run")


@torch.no_grad()
def test_the_untouched_model_reads_and_draws_as_in_transformers(config, liquid):
    """Inputs are as the model was trained, written out; logits those of transformers."""
    parts = Parts(config)
    vocabulary, encoder = parts.vocabulary, parts.encoder
    assert vocabulary.size == ROWS and vocabulary.specials == {name: NAMES.index(name) for name in SPECIALS}
    text = tokenizers.Tokenizer.from_file(str(liquid / "tokenizer.json")).encode("a handwritten seven", add_special_tokens=False).ids
    codes = np.arange(64).reshape(8, 8) % CODES
    image = [5, *(codes.ravel() + TEXT), 6]
    drawing, unconditional = (to_draw(encoder, ["a handwritten seven"], is_unconditional=without) for without in (False, True))
    reading = to_read(encoder, [codes, "a handwritten seven"])
    assert drawing.tokens[: len(text) + 2].tolist() == [2, *text, 5] and drawing.tokens[-2:].tolist() == [6, 1]
    assert unconditional.tokens[:3].tolist() == [2, 4, 5] and reading.tokens.tolist() == [2, *image, *text]
    causal_lm, stock = parts.make_causal_lm().eval(), AutoModelForCausalLM.from_pretrained(liquid, dtype=torch.float32).eval()
    load_initial_weights(str(liquid), causal_lm, vocabulary)
    backbone = parts.make_backbone(causal_lm)
    for tokens in ([2, *text, 1], drawing.tokens, unconditional.tokens, reading.tokens):
        ids = torch.as_tensor(np.array(tokens))[None]
        torch.testing.assert_close(causal_lm(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    steps = stream_tokens(backbone, encoder, [reading], parts.inference_costing, device=parts.device, max_tokens=6)
    said = np.array([token for (token,) in steps])
    assert (vocabulary.is_text(said) | (said == vocabulary.eos)).all(), "no other special token and no code is an answer"


def test_it_is_trained_exported_and_loaded_with_the_same_ids(config, tmp_path):
    run_ranks(1, train, config, 1)
    export(tmp_path / "run", tmp_path / "out")
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out"), Parts(config).vocabulary
    assert tokenizer("<bos>a<boi><code_00003><eoi><eos>")["input_ids"] == [2, *vocabulary.encode_text("a"), 5, TEXT + 3, 6, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (2, 1, ROWS)
    layout = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert layout["first_code"] == TEXT and layout["specials"]["<boi>"] == 5
    first, second = (load_trained(tmp_path / name)[0] for name in ("run", "out"))
    assert second.encoder.vocabulary.specials == vocabulary.specials
    assert (first.draw(["a handwritten seven"]) == second.draw(["a handwritten seven"])).all()


def test_ids_that_the_model_does_not_have_are_refused(liquid, digits_folder):
    for ids, words in (
        ({"first_code": TEXT, "boi": "<image>"}, "the tokenizer has no token '<image>'"),
        ({"first_code": ROWS + 1}, rf"first_code \({ROWS + 1}\) lies behind the model's {ROWS} rows"),
        ({"first_code": 6}, r"<eoi> lies at first_code \(6\) or above"),
    ):
        with pytest.raises(ConfigError, match=words):
            Vocabulary(liquid, CODES, TrainedIds.model_validate(ids))
    with pytest.raises(ConfigError, match="is no Hugging Face folder"):
        Vocabulary(digits_folder / "text.model", CODES, TrainedIds(first_code=TEXT))
