"""The recipes for released models run from end to end on small random folders of the same layout."""

import json

import pytest
import tokenizers
import torch
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3Config, Emu3ForConditionalGeneration, GemmaConfig, GemmaForCausalLM

from megavlm.config import load_config
from megavlm.parts.export import export
from megavlm.parts.trained import load_trained
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train

TEXT = 290
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VQ = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "base_channels": 32, "latent_channels": 32, "embed_dim": 8}


def write_tokenizer(folder, names):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=TEXT, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a handwritten seven"] * 3, trainer)
    tokenizer.add_special_tokens([f"<unused{i}>" for i in range(TEXT - tokenizer.get_vocab_size())])
    return tokenizer


def liquid(folder):
    """A Gemma with codes behind its text, and beside it Chameleon's VQ model."""
    names = ["<pad>", "<bos>", "<eos>", "<unconditional>", "<boi>", "<eoi>"]
    write_tokenizer(folder, names).save(str(folder / "tokenizer.json"))
    GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8, vocab_size=TEXT + 16)).save_pretrained(folder)
    vq = ChameleonVQVAEConfig(num_embeddings=16, resolution=16, double_latent=False, in_channels=3, **VQ)
    ChameleonVQVAE(vq).save_pretrained(folder / "vq")
    return folder / "vq"


def emu3(folder):
    """A multimodal folder: the text decoder, whose tokenizer knows the codes, and the VQ model in one."""
    names = ["<pad>", "<|extra_203|>", "<|extra_204|>", "<|extra_100|>", "<|image start|>", "<|image end|>", "<image>"]
    tokenizer = write_tokenizer(folder, names)
    codes = [f"<|visual token {i:06}|>" for i in range(16)]
    tokenizer.add_special_tokens(codes)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = {"<image>": 6, **{name: tokenizer.token_to_id(name) for name in codes}}
    vq = {**VQ, "codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "attn_resolutions": [], "hidden_size": 32}
    text = {**SIZES, "vocab_size": TEXT + 16}
    model = Emu3ForConditionalGeneration(Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("recipe", "write"), [("liquid-7b", liquid), ("emu3-stage", emu3)])
def test_from_the_released_layout_to_an_export(recipe, write, tmp_path, digits_folder):
    model = tmp_path / "model"
    model.mkdir()
    torch.manual_seed(0)
    vq = write(model)
    architecture = str(model) if write is liquid else {"model_type": "emu3_text_model", "attention_dropout": 0.0, **SIZES}
    small = {name: value for name, value in TINY.items() if not name.startswith("model.")}
    sources = {task: {"shards": f"{digits_folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")}
    filled_in = {
        "run_dir": str(tmp_path / "run"), "model.architecture": architecture, "vocabulary.text_model": str(model), "init_from": str(model),
        "vocabulary.image_tokenizer": {"kind": "vq", "path": str(vq), "height": 8, "width": 8}, "vocabulary.trained_ids.first_code": TEXT,
        "data.sources": sources, "checkpoint.every_steps": 2, "optimizer.num_steps": 2, "model.activation_checkpointing": True,
    }  # fmt: skip
    config = load_config(recipe, small | filled_in)
    trained = run_ranks(2, train, config, 2)[0]
    assert all(torch.isfinite(value).all() for value in trained["weights"].values())
    export(tmp_path / "run", tmp_path / "out")
    layout = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert layout["first_code"] == TEXT and layout["size"] == TEXT + 16 and max(layout["specials"].values()) < TEXT
    drawn = load_trained(tmp_path / "out")[0].draw(["a handwritten seven"])
    assert drawn.shape == (1, 8, 8) and drawn.max() < 16
