"""A stock Hugging Face decoder, driven stage by stage.

Between two stages the token router writes the active rows back into the full residual stream and takes the rows of the next::

    h_TD[active] = x_KD
    x_KD = h_TD[next_active]

Every pack calls the same modules in the same order, whatever it holds (P7).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megavlm.data.pack import Pack
from megavlm.data.sample import TASKS
from megavlm.errors import ConfigError
from megavlm.model import attention
from megavlm.model.loss import chunked_loss


def make_causal_lm(architecture: dict[str, Any], vocabulary_size: int) -> PreTrainedModel:
    """A causal language model of `transformers` with random weights.

    Args:
        architecture: ``model_type`` and the fields of its configuration.
        vocabulary_size: Rows of the embedding and the output head.

    Raises:
        ConfigError: If `transformers` does not know the type or a field.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **fields, vocab_size=vocabulary_size)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"model.architecture is not a configuration of transformers: {error}\n"
            "  do:    name a model_type of transformers, such as qwen3, and the fields of its configuration"
        ) from error
    unknown = [name for name in fields if name not in type(config)().to_dict()]
    if unknown:
        raise ConfigError(
            f"model.architecture: {model_type} has no {', '.join(unknown)}\n"
            f"  do:    use the fields of {type(config).__name__}"
        )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Backbone(nn.Module):
    """Packs in, sums of losses out.

    Args:
        causal_lm: The stock model; its weights are the backbone's.
        num_sources: Sources of the mixture, for losses per source.
        max_labels: Upper bound of a pack's labelled rows.
        chunk_rows: Labelled rows per call of the output head.
        activation_checkpointing: Recompute every layer in the backward pass.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        num_sources: int,
        max_labels: int,
        chunk_rows: int,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.causal_lm = causal_lm
        self.num_groups = num_sources * len(TASKS)
        self.num_chunks = math.ceil(max_labels / chunk_rows)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, pack: Pack | None = None, **decoding) -> torch.Tensor:
        """Sums of cross-entropy per (source, task) of a pack: float32 ``[num_sources * len(TASKS)]``.

        With keyword arguments instead of a pack it is the stock model's own forward pass, for decoding with a cache: under
        ZeRO-3 that too must enter through the module that DeepSpeed wraps.
        """
        if pack is None:
            self.causal_lm.config._attn_implementation = "sdpa"
            return self.causal_lm(**decoding)
        h_TD = self.hidden_states(pack)
        h_MD = self.causal_lm.model.norm(h_TD.index_select(0, pack.rows_M))
        return chunked_loss(
            self.causal_lm.lm_head, h_MD, pack.targets_M, pack.groups_M, self.num_groups, self.num_chunks
        )

    def hidden_states(self, pack: Pack) -> torch.Tensor:
        """The residual stream after the last layer, before the final norm: ``[T, D]``."""
        model = self.causal_lm.model
        model.config._attn_implementation = attention.NAME
        h_TD = model.embed_tokens(pack.tokens_T)
        cos_T, sin_T = (table[0] for table in model.rotary_emb(h_TD[None], pack.positions_T[None]))
        for stage in pack.route.stages:
            active = stage.active_K
            if active is None:
                x_KD, cos_K, sin_K = h_TD, cos_T, sin_T
            else:
                x_KD, cos_K, sin_K = (rows.index_select(0, active) for rows in (h_TD, cos_T, sin_T))
            for layer in model.layers[stage.first_layer : stage.end_layer]:
                x_KD = self._layer(layer, x_KD, (cos_K[None], sin_K[None]), stage.sequences)
            h_TD = x_KD if active is None else h_TD.index_copy(0, active, x_KD)
        return h_TD

    def _layer(self, layer: nn.Module, x_KD: torch.Tensor, rotary: tuple, sequences) -> torch.Tensor:
        def call(x_KD):
            return layer(x_KD[None], attention_mask=None, position_embeddings=rotary, use_cache=False, sequences=sequences)

        if self.activation_checkpointing and torch.is_grad_enabled():
            # not the reentrant kind: that drops gradients when the input needs none
            return checkpoint(call, x_KD, use_reentrant=False)[0]
        return call(x_KD)[0]
