"""The language part of multimodal folders begins a run: taken by name, with the logits that it has there."""

import logging

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from megavlm.errors import ConfigError
from megavlm.model.architecture import ModelConfig
from megavlm.model.backbone import make_causal_lm
from megavlm.training.initial import language_part, load_initial_weights
from tests.parts.test_every_family import Texts

ROWS = 120
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": ROWS, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "attention_dropout": 0.0,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
VQ = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}


def llava():
    text = {"model_type": "llama", **TEXT}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text))


def gemma3():
    vision = {"model_type": "siglip_vision_model", **VISION}
    text = {**TEXT, "head_dim": 8, "sliding_window": 5}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def emu3():
    vq = {"codebook_size": 16, "embed_dim": 4, "z_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
          "attn_resolutions": [], "hidden_size": 32, "latent_channels": 4}  # fmt: skip
    names = {"<image>": 3, **{f"<|visual token {i:06}|>": 50 + i for i in range(16)}, "<|extra_200|>": 4}
    return Emu3ForConditionalGeneration(Emu3Config(text_config=TEXT, vq_config=vq, vocabulary_map=names))


def janus():
    vision = {**VISION, "projection_dim": 32, "num_image_tokens": 4}
    return JanusForConditionalGeneration(JanusConfig(text_config={"model_type": "llama", **TEXT}, vision_config=vision, vq_config=VQ))


@pytest.mark.parametrize("make", [llava, gemma3, emu3, janus])
@torch.no_grad()
def test_a_run_begins_with_the_language_part(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("megavlm.training.initial.same_text_model", lambda *_: False)
    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path)
    causal_lm = make_causal_lm(ModelConfig(architecture=str(tmp_path)).architecture, ROWS).eval()
    with caplog.at_level(logging.INFO):
        load_initial_weights(str(tmp_path), causal_lm, Texts())
    assert "the language part is taken; left out:" in caplog.text
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(causal_lm(ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_older_files_call_it_otherwise(tmp_path):
    for old in ("language_model.model.norm.weight", "text_model.model.norm.weight", "model.language_model.norm.weight"):
        assert language_part(tmp_path, [old, "lm_head.weight", "vision_tower.x"]) == {
            "model.norm.weight": old,
            "lm_head.weight": "lm_head.weight",
        }
    assert language_part(tmp_path, ["language_model.lm_head.weight"]) == {"lm_head.weight": "language_model.lm_head.weight"}
    assert language_part(tmp_path, ["model.norm.weight"]) == {"model.norm.weight": "model.norm.weight"}


def test_a_model_without_such_a_part_is_refused_by_name(make_config):
    with pytest.raises(ConfigError, match="chameleon has no text decoder of its own"):
        make_config({"model.architecture": {"model_type": "chameleon"}})
