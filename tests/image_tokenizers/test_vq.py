"""VQ models of transformers behind the interface, from folders of their own and of whole models; tiny, with random weights."""

import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megavlm.config import load_config
from megavlm.errors import ConfigError
from megavlm.image_tokenizers.protocol import GridOnly
from megavlm.image_tokenizers.vq import VQTokenizer
from megavlm.parts.parts import Parts

CODES = 40
SHAPES = {
    "chameleon": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8},
    "emu3": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 4, "latent_channels": 4,
             "attn_resolutions": [1], "hidden_size": 32},
    "janus": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8}
    | {"num_patches": 4},
}  # fmt: skip
CLASSES = {"chameleon": "ChameleonVQVAE", "emu3": "Emu3VQVAE", "janus": "JanusVQVAE"}


def make_vq(family):
    fields = SHAPES[family] | {"codebook_size" if family == "emu3" else "num_embeddings": CODES}
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[family])(getattr(transformers, CLASSES[family] + "Config")(**fields)).eval()
    for parameter in model.parameters():  # or everything would look alike to it
        torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.3)
    return model


def save_whole(model, family, folder):
    """As ``save_pretrained`` of the model around it: other tensors beside, names with a prefix, the VQ settings inside."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, "vq_config": model.config.to_dict()}))
    tensors = {f"model.vqmodel.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    other = {"lm_head.weight": torch.zeros(3, 3)}
    save_file({name: tensors[name] for name in names[1::2]} | other, folder / "model-00002-of-00002.safetensors")


@pytest.fixture(params=list(SHAPES))
def vq(request, tmp_path):
    model = make_vq(request.param)
    model.save_pretrained(tmp_path / "vq")
    return request.param, model, tmp_path / "vq"


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@torch.no_grad()
def test_codes_and_images_are_those_of_transformers(vq):
    family, model, folder = vq
    tokenizer = VQTokenizer(folder, 4, 4)
    codes = tokenizer.encode(IMAGES)
    assert tokenizer.pixels == (8, 8) and tokenizer.codebook_size == CODES and codes.shape == (3, 4, 4) and codes.dtype == np.int64
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1
    if family == "janus":
        # by hand: transformers compares unscaled latents, and then decodes scaled ones
        z = torch.nn.functional.normalize(model.quant_conv(model.encoder(x)), dim=1).permute(0, 2, 3, 1)
        code = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
        expected = (z[..., None, :] - code).square().sum(-1).argmin(-1)
        assert (model.encode(x, return_dict=True).image_tokens.view(3, 4, 4) != expected).any()
    elif family == "emu3":
        expected = torch.stack(model.encode(x, torch.tensor([[8, 8]] * 3), return_dict=True).image_tokens)
    else:
        expected = model.encode(x, return_dict=True).image_tokens.view(3, 4, 4)
    assert (codes == expected.numpy()).all() and len(np.unique(codes)) > 5
    if family == "chameleon":
        with pytest.raises(ConfigError, match="cannot decode"):
            tokenizer.decode(codes)
        return
    decoded = tokenizer.decode(codes)
    from_transformers = model.decode(expected if family == "emu3" else expected.flatten(1)).permute(0, 2, 3, 1)
    assert decoded.shape == (3, 8, 8, 3) and decoded.dtype == np.uint8 and decoded.std() > 5
    assert np.abs(decoded - ((from_transformers + 1) * 127.5).clamp(0, 255).numpy()).max() <= 0.51


def test_a_whole_model_gives_the_same_codes_and_only_its_vq_part_is_read(vq, tmp_path):
    family, model, folder = vq
    save_whole(model, family, tmp_path / "whole")
    own, whole = VQTokenizer(folder, 4, 4), VQTokenizer(tmp_path / "whole", 4, 4)
    assert (own.encode(IMAGES) == whole.encode(IMAGES)).all() and own.fingerprint == whole.fingerprint


def test_any_size_is_scaled_to_cover_and_cut(vq):
    tokenizer = VQTokenizer(vq[2], 4, 6)
    wide = np.zeros((20, 90, 3), np.uint8)
    wide[:, 30:60] = 255  # the middle third, which is all that stays
    assert tokenizer.fit(wide).shape == (8, 12, 3) and tokenizer.fit(wide)[:, 1:-1].min() > 200
    assert tokenizer.encode([wide, IMAGES[0]]).shape == (2, 4, 6)
    assert (tokenizer.encode([wide, IMAGES[0]])[1] == tokenizer.encode([IMAGES[0]])[0]).all()


def test_sizes_need_no_weights(vq, digits_folder):
    _, _model, folder = vq
    (folder / "model.safetensors").unlink()
    text = {"vocabulary.text_model": str(digits_folder / "text.model")}
    config = load_config("digits", text | {"vocabulary.image_tokenizer": {"kind": "vq", "path": str(folder), "height": 4, "width": 4}})
    tokenizer = Parts(config).image_tokenizer
    assert GridOnly(tokenizer).encode(IMAGES).shape == (3, 4, 4)
    vocabulary = Parts(config).vocabulary
    assert vocabulary.size == vocabulary.first_code + CODES == Parts(config).shape.vocabulary_size
    with pytest.raises(ConfigError, match="not a complete VQ model: it holds no safetensors"):
        pickle.loads(pickle.dumps(tokenizer)).encode(IMAGES)


def test_mistakes_are_told(vq, tmp_path):
    _family, _model, folder = vq
    with pytest.raises(ConfigError, match="holds no config.json"):
        VQTokenizer(tmp_path / "nothing", 4, 4)
    with pytest.raises(ConfigError, match="another VQ model than the run began with"):
        VQTokenizer(folder, 4, 4, expected="0" * 64).encode(IMAGES)
    before = VQTokenizer(folder, 4, 4).fingerprint
    weights = load_file(folder / "model.safetensors")
    name = "quantize.embedding.weight"
    save_file(weights | {name: weights[name] + 1e-3}, folder / "model.safetensors")
    assert VQTokenizer(folder, 4, 4).fingerprint != before
    save_file(weights | {name: weights[name][:7].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="weights do not fit its config.json"):
        VQTokenizer(folder, 4, 4).encode(IMAGES)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="1 of its tensors are missing, the first is quantize.embedding.weight"):
        VQTokenizer(folder, 4, 4).encode(IMAGES)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigError, match="a model of type 'qwen3', not a VQ model"):
        VQTokenizer(folder, 4, 4)


def test_emu3_scales_pixels_as_its_folder_says(tmp_path):
    make_vq("emu3").save_pretrained(tmp_path)
    plain = VQTokenizer(tmp_path, 4, 4)
    before = plain.fingerprint, plain.encode(IMAGES)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.2]}))
    scaled = VQTokenizer(tmp_path, 4, 4)
    assert scaled.fingerprint != before[0] and (scaled.encode(IMAGES) != before[1]).any()
