"""Which decoders of `transformers` megavlm computes exactly, and by what name the others are refused.

The backbone calls a model's embedding, rotary embedding, layers, norm and head itself. What a model does between them, or asks of its
attention beyond causality, would be lost without a word; so a family is taken only if the table of tests/model/test_families.py proves it.
"""

from typing import Any

from transformers import PreTrainedConfig

from megavlm.costs import num_experts
from megavlm.model.configuration import check_names, read_configuration

EXACT = (
    "apertus",
    "arcee",
    "ernie4_5",
    "exaone4",
    "gemma",
    "glm",
    "glm4",
    "helium",
    "jais2",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
)

MULTIPLIES = "multiplies its embeddings, residual stream or logits by factors"
CAPS = "caps its scores or logits softly"
SINKS = "gives its attention sinks"
CARRIES = "carries a state from token to token, and so from one packed sample into the next"
OWN_MASK = "makes an attention mask of its own"
OWN_ROTARY = "has a rotary embedding for each kind of layer, or none"
OWN_LAYOUT = "lays out its layers, norms or heads in another way"
WHY = {
    **dict.fromkeys(("granite", "hyperclovax"), MULTIPLIES),
    **dict.fromkeys(("cohere", "cohere2"), "scales its logits"),
    **dict.fromkeys(("gemma2", "vaultgemma", "nanochat"), CAPS),
    **dict.fromkeys(("gpt_oss", "granite_swa"), SINKS),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h"), CARRIES
    ),
    **dict.fromkeys(
        ("olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"), CARRIES
    ),
    "doge": OWN_MASK,
    **dict.fromkeys(("gemma3", "gemma3_text", "gpt2", "llama4_text", "olmo3", "opt"), OWN_ROTARY),
    **dict.fromkeys(("gpt_neox", "nemotron", "phi", "stablelm"), OWN_LAYOUT),
}
"""What stands in the way of the better known of the others."""
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on a token's place alone."""
DROPOUT_IN_LAYERS = ("residual_dropout", "resid_pdrop")
"""What layers drop themselves; other dropout would be passed by."""
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
    # no row is special: that of a padding token would get no gradient
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
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


def active_window(config: Any, longest: int) -> str:
    """Why sequences of up to ``longest`` tokens cannot be attended to as the model does; empty if they can.

    Layers with a sliding window are exact as long as no sequence is longer than it.
    """
    window = window_of(config)
    if window is None or window >= longest:
        return ""
    return (
        f"layers of this {config.model_type} attend to a sliding window of {window} tokens (sliding_window), which is not computed, and"
        f" sequences may have {longest}; set data.pack_tokens to {window} at most, or sliding_window to null"
    )


def window_of(config: Any) -> int | None:
    """Tokens that the layers with a sliding window look back on; None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return None if kinds is not None and "sliding_attention" not in kinds else window


def rotates(attention: Any) -> bool:
    """Whether an attention layer of an exact family turns its queries and keys by their places."""
    if hasattr(attention, "use_rope"):  # smollm3
        return bool(attention.use_rope)
    # exaone4: with a window, layers that see everything know no places
    return attention.sliding_window is None or attention.is_sliding if hasattr(attention, "is_sliding") else True


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
    rotary = config.rope_parameters.get("rope_type")
    if rotary not in ROTARY:
        return (
            f"{family} with {rotary} rotary embedding (rope_type) is not computed exactly here: its angles depend on what else is in a"
            f" pack; choose one of {', '.join(ROTARY)}"
        )
    return ""
