"""Which decoders of `transformers` megavlm computes exactly, and by what name the others are refused.

The backbone calls a model's embedding, rotary embedding, layers, norm and head itself. What a model does between them, or asks of its
attention beyond causality, would be lost without a word; so a family is taken only if tests/model/test_families.py proves it.
"""

from typing import Any

from transformers import AutoModelForCausalLM, Emu3ForCausalLM, Emu3TextConfig, PreTrainedConfig

from megavlm.costs import num_experts
from megavlm.model.configuration import check_names, read_configuration

EXACT = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "emu3_text_model", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "granite", "helium", "hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "ministral", "mistral", "mixtral", "olmo",
    "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip

# transformers has the class, but not under this configuration
AutoModelForCausalLM.register(Emu3TextConfig, Emu3ForCausalLM, exist_ok=True)

SINKS = "gives its attention sinks"
CARRIES = "carries a state from token to token, and so from one packed sample into the next"
OWN_MASK = "makes an attention mask of its own"
OWN_ROTARY = "has a rotary embedding for each kind of layer, or none"
OWN_LAYOUT = "lays out its layers, norms or heads in another way"
OWN_PLACES = "tells places by a table or a bias, or turns queries inside its attention"
NO_BOUNDARIES = "takes no boundaries of packed samples into its layers"
BESIDE_ENCODER = "is an encoder, or a decoder that looks at one"
COMPRESSES = "compresses keys and values (multi-head latent attention)"
OF_EACH_LAYER = "gives each layer embeddings of its own"
WHY = {
    **dict.fromkeys(("gpt_oss", "granite_swa"), SINKS),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h"), CARRIES
    ),
    **dict.fromkeys(
        ("olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"), CARRIES
    ),
    "doge": OWN_MASK,
    "llama4_text": OWN_ROTARY,
    **dict.fromkeys(("falcon", "gpt_neox", "gpt_neox_japanese", "modernbert-decoder", "persimmon"), OWN_LAYOUT),
    **dict.fromkeys(("biogpt", "bloom", "codegen", "cpmant", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"), OWN_PLACES),
    **dict.fromkeys(("mpt", "openai-gpt", "opt", "reformer", "xglm", "xlm", "xlnet"), OWN_PLACES),
    **dict.fromkeys(("nemotron", "stablelm"), NO_BOUNDARIES),
    **dict.fromkeys(("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small"), BESIDE_ENCODER),
    **dict.fromkeys(("camembert", "data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert"), BESIDE_ENCODER),
    **dict.fromkeys(("mllama_text_model", "musicgen_decoder", "musicgen_melody_decoder", "mvp", "pegasus", "plbart"), BESIDE_ENCODER),
    **dict.fromkeys(("prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr"), BESIDE_ENCODER),
    **dict.fromkeys(("whisper", "xlm-roberta", "xlm-roberta-xl", "xmod"), BESIDE_ENCODER),
    **dict.fromkeys(("minicpm3", "youtu"), COMPRESSES),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), OF_EACH_LAYER),
    "bitnet": "is made for weights of three values",
    "chameleon": "has no text decoder of its own in transformers",
    "blt": "reads patches of bytes",
    "cohere_compass_text": "has three places for each token",
    "dbrx": "is a mixture of experts",
    "diffllama": "takes differences of two attentions",
    "dots1": "is a mixture of experts",
    "hrm_text": "runs its layers in a loop",
    "hunyuan_v1_dense": "normalises queries after it has turned them",
    "ministral3": "scales queries by their places",
    "moshi": "draws several streams of tokens at once",
    "nanochat": "normalises its embeddings",
    "phi4_multimodal": "has encoders and adapters of its own",
}
"""What stands in the way of the others."""
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on a token's place alone."""
DROPOUT_IN_LAYERS = ("residual_dropout", "resid_pdrop")
"""What layers drop themselves; other dropout would be passed by."""
NO_PLACES_WITHOUT_WINDOW = ("cohere2", "exaone4")
"""Families whose layers that see everything know no places; in exaone4 only where others have a window."""
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step",
)  # fmt: skip


def read_exact(architecture: dict[str, Any], vocabulary_size: int) -> PreTrainedConfig:
    """The configuration of an architecture that is computed exactly.

    Raises:
        ValueError: If `transformers` does not know it, a field means nothing, or it is not computed exactly.
    """
    check_names(architecture)
    config = read_configuration(architecture, vocabulary_size)
    if reason := refusal(config):
        given = architecture["model_type"]
        raise ValueError(reason if given == config.model_type else f"the text decoder of {given}: {reason}")
    return config


def refusal(config: Any) -> str:
    """Why a configuration is not taken, in words that name its family; empty if it may be.

    Args:
        config: Configuration of `transformers`, for text.
    """
    family = config.model_type
    if family not in EXACT:
        return f"{family} {_why_not(config)}, which is not computed exactly here; choose one of {', '.join(EXACT)}"
    if config.is_heterogeneous:
        return f"{family} with a configuration per layer (per_layer_config) is not computed exactly here; leave it out"
    return _wrong_size(config) or _inexact_field(config)


def rotates(attention: Any) -> bool:
    """Whether an attention layer of an exact family turns its queries and keys by their places."""
    if hasattr(attention, "use_rope"):  # smollm3
        return bool(attention.use_rope)
    if (family := attention.config.model_type) in NO_PLACES_WITHOUT_WINDOW:
        is_sliding = attention.sliding_window is not None and getattr(attention, "is_sliding", True)
        return is_sliding or (family == "exaone4" and attention.sliding_window is None)
    return True


def _why_not(config: Any) -> str:
    if config.model_type in WHY:
        return WHY[config.model_type]
    if any(getattr(config, name, None) for name in EXPERT_FIELDS):
        return "is a mixture of experts"
    return "is not among the families that are proven exact"


def _wrong_size(config: Any) -> str:
    for name in SIZES:
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            return f"{name} of {config.model_type} must be a positive integer, not {value!r}"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"num_attention_heads ({config.num_attention_heads}) of {config.model_type} must be a multiple of num_key_value_heads"
            f" ({config.num_key_value_heads})"
        )
    if (experts := num_experts(config)) and config.num_experts_per_tok > experts:
        return f"num_experts_per_tok ({config.num_experts_per_tok}) of {config.model_type} is more than its {experts} experts"
    return ""


def _inexact_field(config: Any) -> str:
    family = config.model_type
    if getattr(config, "quantization_config", None):
        return f"{family} with quantised weights (quantization_config) cannot be trained; use the weights before quantisation"
    for name, value in config.to_dict().items():
        if "drop" in name and name not in DROPOUT_IN_LAYERS and value:
            return f"{name} of {family} is {value}, which is not computed here; give its fields as a mapping with {name}: 0.0"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return (
            f"{family} with experts in some of its layers only (mlp_only_layers, decoder_sparse_step) is refused: packs and figures count"
            " on one cost for all layers; leave these fields out"
        )
    for rotary in _rotary_kinds(config):
        if rotary not in ROTARY:
            return (
                f"{family} with {rotary} rotary embedding (rope_type) is not computed exactly here: its angles depend on what else is in a"
                f" pack; choose one of {', '.join(ROTARY)}"
            )
    return ""


def _rotary_kinds(config: Any) -> list[str | None]:
    """Of all layers; some families say them for each kind of layer."""
    parameters = config.rope_parameters
    of_kinds = [inner for inner in parameters.values() if isinstance(inner, dict)] or [parameters]
    return [inner.get("rope_type") for inner in of_kinds]
