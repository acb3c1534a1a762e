"""Every text decoder of transformers is computed exactly, or refused by name when the recipe is read."""

import json
import re

import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megavlm.costs import ModelShape
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.errors import ConfigError
from megavlm.model import attention
from megavlm.model.architecture import ModelConfig
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.configuration import ABOUT_THE_FILE, LEFTOVERS, REPLACED, read_configuration
from megavlm.model.decoding import Decoder
from megavlm.model.ends import final_norm, kind_of, logits_of, rotary_tables
from megavlm.model.families import EXACT, rotates
from megavlm.model.proof import active_weights
from megavlm.model.rotary import without_rotary
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense
from tests.routing.layouts import VOCABULARY, make_samples

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
DENSE_PHASES = Phases.always(Dense(), Dense(), SMALL["num_hidden_layers"])
LAYOUT = [[("TEXT", 11, 1)], [("TEXT", 6, 1)], [("TEXT", 14, 1)]]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
BOTH = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
VARIANTS = [
    ("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    ("cohere2", {"layer_types": BOTH, "sliding_window": 4, "logit_scale": 2.0}),
    ("cwm", {"layer_types": BOTH, "sliding_window": 4}),
    ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": BOTH, "sliding_window": 1}),
    ("gemma3_text", {"layer_types": BOTH, "sliding_window": 4, "rope_local_base_freq": 50.0, "rope_theta": 1e4}),
    ("gemma3_text", {"layer_types": BOTH, "sliding_window": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2}),
    ("hyperclovax", {"embedding_multiplier": 3.0, "logits_scaling": 0.2, "use_post_norm": True}),
    ("mistral", {"sliding_window": 4}),
    ("olmo3", {"layer_types": BOTH, "sliding_window": 4, "rope_scaling": YARN}),
    ("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    ("phi3", {"sliding_window": 5}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    ("vaultgemma", {"sliding_window": 4, "layer_types": BOTH, "attn_logit_softcapping": 0.5}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": YARN}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("llama", {"head_dim": 32, "hidden_act": "gelu"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
    ("qwen3", {"head_dim": 32, "rope_scaling": YARN, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ("gemma", {"head_dim": 32, "pad_token_id": 7}),
    ("mistral", {"sliding_window": None}),
    ("ministral", {"layer_types": KINDS, "sliding_window": 40, "rope_theta": 1e4}),
    ("phi3", {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1}),
    ("olmo", {"clip_qkv": 0.2}),
    ("glm4", {"partial_rotary_factor": 0.5, "head_dim": 32}),
    ("glm", {"partial_rotary_factor": 0.25, "head_dim": 32, "attention_bias": False}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    ("exaone4", {"layer_types": KINDS, "sliding_window": 40, "sliding_window_pattern": None}),
    ("starcoder2", {"use_bias": False}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True}),
    ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "clip_qkv": 0.2}),
    ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 32}),
]


def architecture_of(model_type, **fields):
    kind = CONFIG_MAPPING[model_type]
    sizes = {name: value for name, value in SMALL.items() if name in {*kind.__dataclass_fields__, *kind.attribute_map}}
    if model_type in ("helium", "ministral"):  # transformers makes nothing of the others
        sizes["head_dim"] = 16
    if model_type in ("mixtral", "olmoe", "qwen3_moe"):  # theirs are up to 128
        sizes |= {"num_local_experts" if model_type == "mixtral" else "num_experts": 8, "num_experts_per_tok": 2}
    if "text_config" in kind.sub_configs_defaults:
        text = kind.sub_configs_defaults["text_config"].model_type
        sizes["text_config"] = architecture_of(text) if text in CONFIG_MAPPING else {}
    return {"model_type": model_type, **sizes, **fields}


def make(architecture):
    """A backbone with every parameter random, and a pack of three samples."""
    causal_lm = make_causal_lm(architecture, VOCABULARY).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in causal_lm.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.1, generator)
    costing = Costing(DENSE_PHASES, ModelShape.of(causal_lm.config))
    backbone = Backbone(causal_lm, DENSE_PHASES, num_sources=1, max_labels=99, chunk_rows=99)
    return backbone, build_pack(make_samples(LAYOUT), costing, 1, 0, step=0, seed=0)


def assert_exact(architecture):
    """Packed through the backbone, token by token with a cache, and one by one through transformers: the same logits; and gradients for
    every row that was read."""
    backbone, pack = make(architecture)
    causal_lm = backbone.causal_lm
    h_TD, _ = backbone.hidden_states(pack)
    ours = logits_of(causal_lm, final_norm(causal_lm, h_TD))
    of_sample = ours.split(pack.sequences.lengths)
    assert_decodes(backbone, of_sample)
    causal_lm.config._attn_implementation = "eager"  # the others know no soft caps
    for ids, logits in zip(pack.tokens_T.split(pack.sequences.lengths), of_sample):
        torch.testing.assert_close(logits[None], causal_lm(input_ids=ids[None], use_cache=False).logits, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    rows = causal_lm.get_input_embeddings().weight.grad.abs().sum(1)
    assert rows[pack.tokens_T].all(), "no row is left out of learning"
    for layer in causal_lm.model.layers:
        assert ModelShape.of(causal_lm.config).layer_flops_per_token == 2 * active_weights(layer, causal_lm.config)


@torch.no_grad()
def assert_decodes(backbone, of_sample):
    samples, begins = make_samples(LAYOUT), [3, 5, 8]
    costing = Costing(DENSE_PHASES, ModelShape.of(backbone.causal_lm.config))
    decoder = Decoder(model=backbone, samples=samples, prompt_lengths=begins, costing=costing, device=torch.device("cpu"))
    logits_BV = decoder.start()
    for step in range(2):
        for logits, expected, begin in zip(logits_BV, of_sample, begins):
            torch.testing.assert_close(logits, expected[begin + step - 1], rtol=1e-4, atol=1e-4)
        logits_BV = decoder.feed(torch.tensor([sample.tokens[begin + step] for sample, begin in zip(samples, begins)]))


@pytest.mark.parametrize("model_type", EXACT)
def test_exact_families(model_type):
    ModelConfig(architecture=architecture_of(model_type))
    assert_exact(architecture_of(model_type))


@pytest.mark.parametrize(("model_type", "fields"), VARIANTS)
def test_exact_variants(model_type, fields):
    architecture = architecture_of(model_type, **fields)
    before = json.dumps(architecture)
    ModelConfig(architecture=architecture)
    assert_exact(architecture)
    assert json.dumps(architecture) == before, "a recipe is not changed by being read"


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_decoder_is_exact_or_refused_by_name(model_type):
    architecture = architecture_of(model_type)
    try:
        ModelConfig(architecture=architecture)
    except ValidationError as error:
        words = error.errors()[0]["msg"]
        assert model_type not in EXACT and re.search(rf"\b{re.escape(model_type)}\b", words)
        assert "not among the families" not in words, "the feature has a name"
        with pytest.raises(ConfigError, match=re.escape(model_type)):
            make_causal_lm(architecture, VOCABULARY)
    else:
        assert_exact(architecture)


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("stablelm", {}, "stablelm takes no boundaries of packed samples into its layers"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "this gemma3_text is not computed exactly here"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "gemma3_text with dynamic rotary"),
        ("minicpm3", {}, "minicpm3 compresses keys and values"),
        ("gpt_oss", {}, "gpt_oss gives its attention sinks"),
        ("deepseek_v3", {}, "deepseek_v3 is a mixture of experts"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "qwen3_moe with experts in some of its layers only"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "qwen3_moe with experts in some of its layers only"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok (9) of mixtral is more than its 8 experts"),
        ("qwen3_next", {}, "qwen3_next carries a state"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "llama with dynamic rotary"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}, "phi3 with longrope"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout of llama is 0.1"),
        ("seed_oss", {"attention_dropout": 0.2}, "attention_dropout of seed_oss is 0.2"),
        ("starcoder2", {"embedding_dropout": 0.1}, "embedding_dropout of starcoder2"),
        ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop of phi3"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers of llama must be a positive"),
        ("llama", {"hidden_act": "gelo"}, "hidden_act 'gelo' is no activation"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("llama", {"is_causal": False, "architectures": ["LlamaForCausalLM"]}, "this llama is not computed exactly here"),
        ("llama", {"per_layer_config": {"1": {"num_key_value_heads": 4}}}, "llama with a configuration per layer"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "llama with quantised weights"),
        ("qwen3", {"hiden_size": 3}, "qwen3 has no hiden_size. Did you mean hidden_size?"),
        ("llama", {"rope_tetha": 3}, "llama has no rope_tetha. Did you mean rope_theta?"),
        ("llama", {"rope_scaling": {"type": "yarn", "facter": 3}}, "no rope_scaling.facter. Did you mean rope_scaling.factor?"),
        ("llama", {"hidden_size": "many"}, "transformers makes no configuration of this llama"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(model_type, fields, words, make_config):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_config({"model.architecture": architecture_of(model_type, **fields)})


@pytest.mark.parametrize("asked", [{"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"position_bias": torch.zeros(1)}])
def test_attention_refuses_what_it_does_not_know(asked):
    backbone, pack = make(architecture_of("llama"))
    context = attention.Context(pack.sequences)
    q = torch.zeros(1, 4, pack.num_tokens, 16)
    attention._for_transformers(backbone, q, q, q, None, scaling=1.0, context=context, softcap=None, dropout=0.0)
    with pytest.raises(ConfigError, match=next(iter(asked))):
        attention._for_transformers(backbone, q, q, q, None, scaling=1.0, context=context, **asked)
    with pytest.raises(ConfigError, match="attention_mask"):
        attention._for_transformers(backbone, q, q, q, torch.zeros(1), scaling=1.0, context=context)


def test_reading_touches_no_random_generator():
    before = torch.get_rng_state()
    ModelConfig(architecture=architecture_of("llama", rms_norm_eps=1.5e-6))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("model_type", "fields"), [*((family, {}) for family in EXACT), *VARIANTS])
def test_queries_and_keys_are_turned_back_exactly(model_type, fields):
    """Where a layer's input knows no places, neither must what selectors see of it."""
    backbone, pack = make(architecture_of(model_type, **fields))
    model = backbone.causal_lm.model
    model.config._attn_implementation = attention.NAME
    x_1TD = torch.randn(1, pack.num_tokens, 64, generator=torch.Generator().manual_seed(0))
    places = (pack.positions_T, torch.zeros_like(pack.positions_T))
    for layer, module in enumerate(model.layers):
        seen = []
        context = attention.Context(pack.sequences, observe=lambda q, k, v, scale, seen=seen: seen.append((q, k)))
        kind = kind_of(model, layer)
        tables = [rotary_tables(model, x_1TD[0], positions_T)[kind] for positions_T in places]
        tables = [(cos[None], sin[None]) for cos, sin in tables]
        for table in tables:
            module(x_1TD, attention_mask=None, position_embeddings=table, use_cache=False, context=context)
        turned_back = [without_rotary(model, layer, cos[0], sin[0], *pair) for (cos, sin), pair in zip(tables, seen)]
        torch.testing.assert_close(turned_back[0], turned_back[1], rtol=1e-4, atol=1e-5)
        # yarn scales what it turns
        scaling = getattr(model.rotary_emb, f"{kind}_attention_scaling" if kind else "attention_scaling")
        turned = tables[0][0].shape[-1]
        expected = [torch.cat([x[..., :turned] / scaling, x[..., turned:]], -1) for x in seen[1]]
        torch.testing.assert_close(turned_back[1], tuple(expected), rtol=1e-4, atol=1e-5)
        assert torch.allclose(seen[0][0], seen[1][0], atol=1e-4) != rotates(module.self_attn)


PUBLISHED = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 21, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "head_dim": 16, "mlp_bias": False, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {**LLAMA3}, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": 2047, "torch_dtype": "bfloat16", "vocab_size": 32064,
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"], "bos_token_id": 2, "eos_token_id": 1, "head_dim": 16, "hidden_act": "gelu",
        "hidden_activation": None, "pad_token_id": 0, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 128004,
        "layer_types": ["full_attention"] * 4, "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0,
        "sliding_window": None, "use_sliding_window": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "glm4": {
        "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "eos_token_id": [151329, 151336], "head_dim": 16,
        "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "vocab_size": 151552,
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"], "eos_token_id": 100257, "pad_token_id": 100277, "rope_scaling": None,
        "rope_theta": 500000, "torch_dtype": "float32", "vocab_size": 100352,
    },
    "starcoder2": {
        "architectures": ["Starcoder2ForCausalLM"], "activation_function": "gelu", "mlp_type": "default", "norm_type": "layer_norm",
        "norm_epsilon": 1e-05, "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
@pytest.mark.parametrize("inline", [False, True], ids=["folder", "inline"])
def test_published_files_mean_what_autoconfig_makes_of_them(model_type, inline, tmp_path, make_config):
    tree = architecture_of(model_type, **PUBLISHED[model_type])
    (tmp_path / "config.json").write_text(json.dumps(tree))
    expected = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).to_dict()
    given = yaml.safe_load(yaml.safe_dump(tree)) if inline else str(tmp_path)
    config = make_config({"model.architecture": given})
    ours = read_configuration(config.model.architecture, VOCABULARY).to_dict()
    without_meaning = {*REPLACED, *ABOUT_THE_FILE, *LEFTOVERS, "_name_or_path", "activation_function", "mlp_type", "norm_type"}
    for name in {*expected, *ours} - without_meaning:
        assert ours.get(name) == expected.get(name), name
    assert_exact(config.model.architecture)


def test_misspelt_names_of_a_published_file_are_refused(tmp_path, make_config):
    tree = architecture_of("llama", **PUBLISHED["llama"], num_hidden_layer=3)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="llama has no num_hidden_layer. Did you mean num_hidden_layers?"):
        make_config({"model.architecture": str(tmp_path)})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no mapping"):
        make_config({"model.architecture": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    with pytest.raises(ConfigError, match="needs code of its own"):
        make_config({"model.architecture": str(tmp_path)})


def test_of_a_multimodal_model_the_text_decoder_is_taken(tmp_path, make_config):
    text = architecture_of("llama", rope_theta=5e5, rms_norm_eps=1e-5)
    tree = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text, "image_token_index": 7}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for given in (str(tmp_path), tree):
        config = make_config({"model.architecture": given})
        read = read_configuration(config.model.architecture, VOCABULARY)
        assert read.model_type == "llama" and read.rope_parameters["rope_theta"] == 5e5
        assert_exact(config.model.architecture)
    assert_exact(make_config({"model.architecture": architecture_of("gemma3")}).model.architecture)
    with pytest.raises(ConfigError, match="the text decoder of gemma3n: gemma3n_text gives each layer"):
        make_config({"model.architecture": {"model_type": "gemma3n"}})
