"""What decoders do before their first layer and after their last: the embedding, the rotary tables, the final norm, the logits.

`transformers` does this in the ``forward`` of each family; the backbone drives the layers itself and so does it here. What is left out
shows in `megavlm.model.proof`. Tested by `tests/model/test_families.py`.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

FINAL_NORMS = ("norm", "final_layernorm")
"""Names of the norm after the last layer."""
Tables = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Kind of layer → its cosines and sines ``[T, d]``."""


def embed(causal_lm: PreTrainedModel, tokens_T: torch.Tensor) -> torch.Tensor:
    """What the first layer gets ``[T, D]``. Granite multiplies it by a factor (arXiv 2408.13359)."""
    embedding_TD = causal_lm.model.embed_tokens(tokens_T)
    factor = getattr(causal_lm.config, "embedding_multiplier", 1)
    return embedding_TD if factor == 1 else embedding_TD * factor


def rotary_tables(model: Any, x_TD: torch.Tensor, positions_T: torch.Tensor) -> Tables:
    """Cosines and sines of places. Gemma 3 and OLMo 3 have others for each kind of layer; elsewhere all layers are of one kind."""
    rotary, places = model.rotary_emb, (x_TD[None], positions_T[None])
    kinds = getattr(rotary, "layer_types", None)
    tables = {"": rotary(*places)} if kinds is None else {kind: rotary(*places, kind) for kind in kinds}
    return {kind: (cos[0], sin[0]) for kind, (cos, sin) in tables.items()}


def kind_of(model: Any, layer: int) -> str:
    """The kind of a layer in `rotary_tables`."""
    return "" if getattr(model.rotary_emb, "layer_types", None) is None else model.config.layer_types[layer]


def final_norm(causal_lm: PreTrainedModel, h_TD: torch.Tensor) -> torch.Tensor:
    """The residual stream after the last layer, normalised."""
    norm = next(getattr(causal_lm.model, name) for name in FINAL_NORMS if hasattr(causal_lm.model, name))
    return norm(h_TD)


def logits_of(causal_lm: PreTrainedModel, h_TD: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` of normalised rows; scaled (Granite, Cohere) or softly capped (Gemma 2) where the family does so."""
    config, logits_TV = causal_lm.config, causal_lm.lm_head(h_TD)
    if (factor := _logit_factor(config)) != 1:
        logits_TV = logits_TV * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_TV = cap * torch.tanh(logits_TV / cap)
    return logits_TV


def _logit_factor(config: Any) -> float:
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        return scaling if config.model_type == "hyperclovax" else 1 / scaling
    return getattr(config, "logit_scale", None) or 1
