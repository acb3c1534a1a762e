"""Decoding with a key/value cache, along a route: a token that skips layers leaves nothing in their caches.

The whole sequences are laid out first, what is yet to be drawn as placeholders, and routed as in training; so every policy and selector
decides as it did there. One packed forward pass over them fills the caches: nothing before a placeholder depends on it (P6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.model.backbone import Backbone
from megavlm.routing.route import Choice, Stage


class Decoder:
    """A batch of B sequences, their caches, and what was decided for their tokens.

    Args:
        model: A `Backbone`, or a DeepSpeed engine around one.
        samples: Whole sequences; tokens from ``prompt_lengths`` on are placeholders.
        prompt_lengths: Tokens given of each sequence.
        costing: Of the routing plan to follow.
        device: Where the model is.
        num_more: Text tokens to make room for after the sequences; text is active in every layer.
    """

    def __init__(
        self,
        model: Callable,
        samples: Sequence[EncodedSample],
        prompt_lengths: Sequence[int],
        costing: Costing,
        device: torch.device,
        num_more: int = 0,
    ):
        self.model, self.device = model, device
        self.pack: Pack = build_pack(list(samples), costing, num_sources=1, lane=0, step=0, seed=0).to(device)
        self.lengths_B = torch.tensor(self.pack.sequences.lengths, device=device)
        self.starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        self.place_B = torch.tensor(list(prompt_lengths), device=device)
        self.capacity = max(self.pack.sequences.lengths) + num_more
        self.caches: dict[int, LayerCache] = {}
        self.gates = {
            (s, choice.task): _GateCounts(choice, self.pack)
            for s, stage in enumerate(self.pack.route.stages)
            for choice in stage.choices
            if choice.plan.how == "gate"
        }

    def start(self) -> torch.Tensor:
        """Read the prompts; float32 logits ``[B, V]`` of the token after each."""
        return self.model(self._prefill)

    def feed(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append a token to each sequence; float32 logits ``[B, V]`` of the next."""
        self._tokens_B = tokens_B
        logits_BV = self.model(self._step)
        self.place_B = self.place_B + 1
        return logits_BV

    def _prefill(self, backbone: Backbone) -> torch.Tensor:
        sequence_T = torch.repeat_interleave(torch.arange(len(self.lengths_B), device=self.device), self.lengths_B)

        def observe(layer, active, _q, k_KHd, v_KHd, _scale, context):
            cache = self.caches[layer] = LayerCache(len(self.lengths_B), self.capacity, k_KHd)
            rows_K = torch.arange(len(sequence_T), device=self.device) if active is None else active
            bias_K = context.log_sizes_K
            bias_K = k_KHd.new_zeros(len(rows_K)) if bias_K is None else bias_K.to(k_KHd.dtype)
            if (guests := context.guests) is not None:
                # in the caches the order of keys does not matter
                stage = next(stage for stage in self.pack.route.stages if stage.first_layer <= layer < stage.end_layer)
                rows_R = torch.cat([injection.rows_R for injection in stage.injections])
                rows_K = torch.cat([rows_K, rows_R])
                k_KHd, v_KHd = torch.cat([k_KHd, guests.k_RHd]), torch.cat([v_KHd, guests.v_RHd])
                bias_K = torch.cat([bias_K, bias_K.new_zeros(len(rows_R))])
            is_given = self.pack.positions_T[rows_K] < self.place_B[sequence_T[rows_K]]
            cache.fill(sequence_T[rows_K][is_given], k_KHd[is_given], v_KHd[is_given], bias_K[is_given])

        h_TD, _ = backbone.hidden_states(self.pack, observe)
        return self._logits(backbone, h_TD[self.starts_B + self.place_B - 1])

    def _step(self, backbone: Backbone) -> torch.Tensor:
        model = backbone.causal_lm.model
        h_BD = model.embed_tokens(self._tokens_B)
        cos_B, sin_B = (table[0] for table in model.rotary_emb(h_BD[None], self.place_B[None]))
        is_placeholder_B = self.place_B < self.lengths_B
        rows_B = torch.where(is_placeholder_B, self.starts_B + self.place_B, -1)
        for s, stage in enumerate(self.pack.route.stages):
            is_active_B, gate_B = self._decide(backbone, s, stage, rows_B, h_BD)
            chosen_K = is_active_B.nonzero()[:, 0]
            if len(chosen_K) == 0:  # stock layers take no empty input; all ranks draw the same and skip together
                continue
            x_KD, rotary = h_BD[chosen_K], (cos_B[None, chosen_K], sin_B[None, chosen_K])
            for layer in range(stage.first_layer, stage.end_layer):
                context = self.caches[layer].for_sequences(chosen_K)
                x_KD = model.layers[layer](x_KD[None], attention_mask=None, position_embeddings=rotary, use_cache=False, context=context)[0]
            gate_K1 = gate_B[chosen_K, None].to(h_BD.dtype)
            h_BD = h_BD.index_copy(0, chosen_K, h_BD[chosen_K] + gate_K1 * (x_KD - h_BD[chosen_K]))
        return self._logits(backbone, h_BD)

    def _decide(self, backbone, s: int, stage: Stage, rows_B, h_BD) -> tuple[torch.Tensor, torch.Tensor]:
        """Which sequences' tokens are active in a stage, and what its outcome is scaled by."""
        is_active_B = torch.ones(len(rows_B), dtype=torch.bool, device=self.device)
        gate_B = torch.ones(len(rows_B), device=self.device)
        if stage.active_K is not None:
            is_active_B = torch.isin(rows_B, stage.active_K) | (rows_B < 0)
        for choice in stage.choices:
            if choice.plan.how == "gate":
                logit_B = backbone.gates[f"{choice.task}_{stage.first_layer}"](h_BD)[:, 0].float()
                is_candidate_B, goes_B = self.gates[s, choice.task].decide(rows_B, logit_B > 0)
                is_active_B = is_active_B | (is_candidate_B & goes_B)
                gate_B = torch.where(is_candidate_B, logit_B.sigmoid(), gate_B)
        return is_active_B, gate_B

    def _logits(self, backbone: Backbone, h_BD: torch.Tensor) -> torch.Tensor:
        return backbone.causal_lm.lm_head(backbone.causal_lm.model.norm(h_BD)).float()


class _GateCounts:
    """Runs the quota of `megavlm.routing.gates.causal_quota` token by token."""

    def __init__(self, choice: Choice, pack: Pack):
        among = pack.route.candidates[choice.task]
        device = pack.tokens_T.device
        num_rows = pack.num_tokens
        self.quota_T, self.left_T = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        self.span_T = torch.full((num_rows,), -1, device=device)
        self.quota_T[among.rows_C], self.left_T[among.rows_C] = choice.quota_C, among.left_C
        self.span_T[among.rows_C] = among.span_C
        self.opened_N = torch.zeros(len(among.lengths) + 1, dtype=torch.int64, device=device)

    def decide(self, rows_B: torch.Tensor, is_open_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each row is a candidate, and whether it goes through."""
        span_B = torch.where(rows_B < 0, -1, self.span_T[rows_B])
        quota_B, before_B = self.quota_T[rows_B], self.opened_N[span_B]
        is_forced_B = quota_B - before_B.minimum(quota_B) >= self.left_T[rows_B]
        goes_B = is_forced_B | (is_open_B & (before_B < quota_B))
        is_candidate_B = span_B >= 0
        self.opened_N = self.opened_N.index_add(0, span_B % len(self.opened_N), (is_open_B & is_candidate_B).long())
        return is_candidate_B, goes_B


class LayerCache:
    """Keys, values and biases that a layer has seen of each of B sequences.

    Args:
        num_sequences: B.
        capacity: Most keys of a sequence.
        like_KHd: Keys, for their shape, type and device.
    """

    def __init__(self, num_sequences: int, capacity: int, like_KHd: torch.Tensor):
        shape = (num_sequences, capacity, *like_KHd.shape[1:])
        self.k_BLHd, self.v_BLHd = like_KHd.new_zeros(shape), like_KHd.new_zeros(shape)
        self.bias_BL = like_KHd.new_zeros(shape[:2])
        self.lengths_B = torch.zeros(num_sequences, dtype=torch.int64, device=like_KHd.device)

    def fill(self, sequence_K, k_KHd, v_KHd, bias_K) -> None:
        """Put keys of any sequences, in any order, into the empty cache."""
        order = sequence_K.argsort(stable=True)
        sequence_K = sequence_K[order]
        self.lengths_B = torch.bincount(sequence_K, minlength=len(self.lengths_B))
        first_B = self.lengths_B.cumsum(0) - self.lengths_B
        place_K = torch.arange(len(order), device=order.device) - first_B[sequence_K]
        self.k_BLHd[sequence_K, place_K] = k_KHd[order]
        self.v_BLHd[sequence_K, place_K] = v_KHd[order]
        self.bias_BL[sequence_K, place_K] = bias_K[order]

    def for_sequences(self, chosen_K: torch.Tensor) -> "CacheView":
        return CacheView(self, chosen_K)


@dataclass
class CacheView:
    """The attention context of a decoding step: one query for each of some sequences."""

    cache: LayerCache
    chosen_K: torch.Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that there is room for."""
        return self.cache.k_BLHd.shape[1]

    def attend(self, q_KHd: torch.Tensor, k_KHd: torch.Tensor, v_KHd: torch.Tensor, scale: float) -> torch.Tensor:
        """Append the keys and values; attention of each query to its sequence's keys, ``[K, H, d]``."""
        cache, chosen = self.cache, self.chosen_K
        cache.k_BLHd[chosen, cache.lengths_B[chosen]] = k_KHd
        cache.v_BLHd[chosen, cache.lengths_B[chosen]] = v_KHd
        cache.lengths_B = cache.lengths_B.index_add(0, chosen, torch.ones_like(chosen))
        lengths_K = cache.lengths_B[chosen]
        longest = int(cache.lengths_B.max())
        is_there_KL = torch.arange(longest, device=chosen.device) < lengths_K[:, None]
        bias_KL = cache.bias_BL[chosen, :longest].masked_fill(~is_there_KL, -torch.inf)
        groups = q_KHd.shape[1] // k_KHd.shape[1]
        k_KHLd, v_KHLd = (x[chosen, :longest].transpose(1, 2).repeat_interleave(groups, dim=1) for x in (cache.k_BLHd, cache.v_BLHd))
        out = functional.scaled_dot_product_attention(
            q_KHd[:, :, None], k_KHLd, v_KHLd, attn_mask=bias_KL[:, None, None].to(q_KHd.dtype), scale=scale
        )
        return out[:, :, 0]
