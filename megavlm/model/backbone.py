"""A stock Hugging Face decoder, driven stage by stage.

Between two stages the token router (`megavlm.routing.router`) writes the active rows back into the full residual stream and takes
the rows of the next::

    h_TD[active] = x_KD
    x_KD = h_TD[next_active]

Every pack calls the same modules in the same order, whatever it holds (P7).

Letters: R rows that are injected, have features or are blocks, P codes of a block, F numbers of a feature, U active tokens and guests in
order, G sums that are given.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from megavlm.costs import ModelShape
from megavlm.data.pack.pack import Pack
from megavlm.data.pack.patches import ABSENT
from megavlm.errors import ConfigError
from megavlm.model import attention
from megavlm.model.attention import Context, Guests
from megavlm.model.ends import embed, final_norm, kind_of, logits_of, rotary_tables
from megavlm.model.experts import RouterWatch, balance_losses, expert_blocks, implementation_for
from megavlm.model.families import read_exact
from megavlm.model.fusion import Part, fuse
from megavlm.model.loss import chunked_loss
from megavlm.model.partial import in_parts
from megavlm.model.rotary import without_rotary
from megavlm.routing.injection import Injector
from megavlm.routing.phases import Phases
from megavlm.routing.route import Stage
from megavlm.routing.router import Router
from megavlm.routing.rows import take_rows
from megavlm.routing.tasks import TASKS, Task


def make_causal_lm(architecture: dict[str, Any], vocabulary_size: int) -> PreTrainedModel:
    """A causal language model of `transformers` with random weights.

    Args:
        architecture: ``model_type`` and the fields of its configuration.
        vocabulary_size: Rows of the embedding and the output head.

    Raises:
        ConfigError: If `transformers` does not know the type or a field, or it is not computed exactly here.
    """
    try:
        config = read_exact(architecture, vocabulary_size)
    except ValueError as error:
        raise ConfigError(f"model.architecture: {error}") from error
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Backbone(nn.Module):
    """Packs in, sums of losses out.

    Args:
        causal_lm: The stock model; its weights are the backbone's.
        phases: The run's routing plans; gates and injectors that their policies need become parts of the backbone.
        num_sources: Sources of the mixture, for losses per source.
        max_labels: Upper bound of a pack's labelled rows.
        chunk_rows: Labelled rows per call of the output head.
        activation_checkpointing: Recompute every layer in the backward pass, or every n-th.
        feature_width: F of the features that images which are read consist of; 0 if they are read as codes.
        compiled: Small functions that are compiled.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        phases: Phases,
        num_sources: int,
        max_labels: int,
        *,
        chunk_rows: int,
        activation_checkpointing: bool | int = False,
        feature_width: int = 0,
        compiled: Collection[Part] = (),
    ):
        super().__init__()
        self.causal_lm = causal_lm
        fuse(causal_lm, compiled)
        self.compiles_loss = "loss" in compiled
        self.num_groups = num_sources * len(TASKS)
        """Pairs of a source and a task."""
        self.num_chunks = math.ceil(max_labels / chunk_rows)
        self.recompute_every = int(activation_checkpointing)
        self.observe: Callable | None = None
        """Sees every layer of every pack until it is taken away again; see `hidden_states`."""
        self.routers = RouterWatch(expert_blocks(causal_lm))
        shape = ModelShape.of(causal_lm.config)
        self.reader = nn.Linear(feature_width, shape.width) if feature_width else None
        self.gates = nn.ModuleDict()
        self.injectors = nn.ModuleDict()
        for task in (Task.UNDERSTANDING, Task.GENERATION):
            for layer in phases.layers_that("gate", task):
                self.gates[f"{task}_{layer}"] = nn.Linear(shape.width, 1)
            for layer in phases.layers_that("inject", task):
                self.injectors[f"{task}_{layer}"] = Injector(shape.width, shape.num_kv_heads, shape.head_width)

    def forward(self, work) -> torch.Tensor:
        """Sums of losses of a pack: float32 ``[num_groups + 1]``, and one more with experts.

        Cross-entropy per (source, task), then the auxiliary loss of learned gates, then the mean over layers of what balances experts.
        Anything but a pack is called with the backbone: under ZeRO-3 decoding too must enter through the module that DeepSpeed wraps.
        """
        if not isinstance(work, Pack):
            return work(self)
        with self.routers.watching() as routers:
            h_TD, gate_loss = self.hidden_states(work, self.observe)
        h_MD = final_norm(self.causal_lm, take_rows(h_TD, work.rows_M))
        sums_G = chunked_loss(
            partial(logits_of, self.causal_lm),
            h_MD,
            work.targets_M,
            work.groups_M,
            num_groups=self.num_groups,
            num_chunks=self.num_chunks,
            is_compiled=self.compiles_loss,
        )
        return torch.cat([sums_G, gate_loss[None], *balance_losses(routers)])

    def hidden_states(self, pack: Pack, observe: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after the last layer, before the final norm ``[T, D]``, and the sum of the gates' loss.

        Args:
            pack: On the model's device.
            observe: Called in every layer, and again where a layer is recomputed, with its number, the active rows, their queries, keys
                and values, the layer's `Scoring`, and its `Context`.
        """
        model = self.causal_lm.model
        model.config._attn_implementation = attention.NAME
        model.config._experts_implementation = implementation_for(model.embed_tokens.weight.dtype)
        embedding_TD = self._embed(pack)
        tables = rotary_tables(model, embedding_TD, pack.positions_T)
        router = Router(pack.route, embedding_TD, self.gates)
        for stage in pack.route.stages:
            active = router.enter(stage)
            x_KD, *taken = router.take(active, *(table for of_kind in tables.values() for table in of_kind))
            rotary = dict(zip(tables, zip(taken[::2], taken[1::2])))
            parts = router.parts(stage, active)
            context = Context(stage.sequences, split=stage.split, parts=parts)
            if router.log_sizes_T is not None:
                (context.log_sizes_K,) = router.take(active, router.log_sizes_T)[1:]
            places = _places(stage, active, len(embedding_TD)) if stage.injections else None
            for layer in range(stage.first_layer, stage.end_layer):
                if places is not None:
                    context.guests = self._guests(stage, layer, places, embedding_TD)
                cos_K, sin_K = rotary[kind_of(model, layer)]
                is_watched = stage.is_watched and layer == stage.end_layer - 1
                context.observe = None
                if is_watched or observe:
                    without_places = partial(without_rotary, model, layer, cos_K, sin_K)
                    context.observe = _observer(
                        partial(router.watch, active, parts.asking_P) if is_watched else None,
                        partial(observe, layer, active) if observe else None,
                        without_places=without_places,
                        context=context,
                    )
                x_KD = self._layer(layer, x_KD, (cos_K[None], sin_K[None]), replace(context))
            router.write(active, x_KD)
        return router.h_TD, router.gate_loss

    def _embed(self, pack: Pack) -> torch.Tensor:
        """Embeddings of the tokens, or what the reader makes of the features in their place."""
        embedding_TD = self._embed_blocks(pack) if pack.has_patches else embed(self.causal_lm, pack.tokens_T)
        if self.reader is None:
            return embedding_TD
        # a pack without such images goes through the reader with no rows (P7)
        features_RF = pack.features_RF.view(-1, self.reader.in_features).to(embedding_TD.dtype)
        return embedding_TD.index_copy(0, pack.feature_rows_R, self.reader(features_RF))

    def _embed_blocks(self, pack: Pack) -> torch.Tensor:
        """Embeddings of the tokens, a block's being the mean of its codes'."""
        num_blocks, num_codes = pack.patch_ids_RP.shape
        # once for all: every rank calls the same modules equally often, whatever its packs hold (P7)
        ids = torch.cat([pack.tokens_T, pack.patch_ids_RP.clamp(min=0).flatten()])
        embedding_TD, of_codes = embed(self.causal_lm, ids).split([pack.num_tokens, num_blocks * num_codes])
        is_code_RP1 = (pack.patch_ids_RP != ABSENT)[:, :, None].to(of_codes.dtype)
        codes_RPD = of_codes.view(num_blocks, num_codes, of_codes.shape[1])
        means_RD = (codes_RPD * is_code_RP1).sum(1) / is_code_RP1.sum(1)
        return embedding_TD.index_copy(0, pack.patch_rows_R, means_RD)

    def _guests(self, stage: Stage, layer: int, places: tuple[torch.Tensor, torch.Tensor], embedding_TD: torch.Tensor) -> Guests:
        """Keys and values of a layer for rows that do not travel."""
        parts = [self.injectors[f"{injection.task}_{layer}"](take_rows(embedding_TD, injection.rows_R)) for injection in stage.injections]
        k_RHd, v_RHd = (torch.cat(part) for part in zip(*parts))
        return Guests(k_RHd, v_RHd, *places, stage.injections[0].sequences)

    def _layer(self, layer: int, x_KD: torch.Tensor, rotary: tuple, context: Context) -> torch.Tensor:
        module = self.causal_lm.model.layers[layer]

        def call(x_KD):
            with in_parts(module, context.parts):
                return module(x_KD[None], attention_mask=None, position_embeddings=rotary, use_cache=False, context=context)

        if self.recomputes(layer) and torch.is_grad_enabled():
            # not the reentrant kind: that drops gradients when the input needs none
            return checkpoint(call, x_KD, use_reentrant=False)[0]
        return call(x_KD)[0]

    def recomputes(self, layer: int) -> bool:
        """Whether a layer is computed again in the backward pass."""
        return self.recompute_every > 0 and (layer + 1) % self.recompute_every == 0

    def recomputed_shares(self, bounds: Sequence[tuple[int, int]]) -> list[float]:
        """What share of each stage (first layer, end layer), and of the output head, the backward pass computes again."""
        layers = [sum(map(self.recomputes, range(first, end))) / (end - first) for first, end in bounds]
        return [*layers, float(self.num_chunks > 1)]


def _places(stage: Stage, active: torch.Tensor | None, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where active rows and guests stand among both, in the pack's order; the same in all layers of a stage."""
    rows_R = torch.cat([injection.rows_R for injection in stage.injections])
    rows_K = torch.arange(num_tokens, device=rows_R.device) if active is None else active
    rows_U = torch.cat([rows_K, rows_R]).sort().values
    return torch.searchsorted(rows_U, rows_K), torch.searchsorted(rows_U, rows_R)


def _observer(watch: Callable | None, observe: Callable | None, *, without_places: Callable, context: Context):
    """What a layer's attention calls: tells the router, or whoever observes the forward pass, or both."""

    def call(q_KHd, k_KHd, v_KHd, scoring):
        if watch is not None:
            groups = q_KHd.shape[1] // k_KHd.shape[1]
            q, k = without_places(q_KHd.detach(), k_KHd.detach())
            watch(q, k.repeat_interleave(groups, dim=1))
        if observe is not None:
            observe(q_KHd, k_KHd, v_KHd, scoring, context)

    return call
