"""Decoding with a key/value cache, along a route: a token that skips layers leaves nothing in their caches.

The whole sequences are laid out first, what is yet to be drawn as placeholders, and routed as in training; so every policy and selector
decides as it did there. One packed forward pass over them fills the caches: nothing before a placeholder depends on it (P6). Where a
placeholder would decide which tokens are active, decoding is refused (`check_start`).

Letters: B sequences, L keys in a cache, C candidates, R rows that give only keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.model.attention import Context, Scoring
from megavlm.model.backbone import Backbone
from megavlm.model.decoding_start import check_start
from megavlm.model.ends import embed, final_norm, kind_of, logits_of, rotary_tables
from megavlm.model.partial import in_parts
from megavlm.routing.gates import at_least_float32
from megavlm.routing.route import Choice, Route, Stage
from megavlm.routing.router import WHOLE, Parts


class Decoder:
    """A batch of B sequences, their caches, and what was decided for their tokens.

    Args:
        model: A `Backbone`, or a DeepSpeed engine around one.
        samples: Whole sequences; tokens from ``prompt_lengths`` on are placeholders.
        prompt_lengths: Tokens given of each sequence, at least one; they may end anywhere, inside an image too.
        costing: Costing of the routing plan to follow.
        device: Where the model is.
        num_more: Text tokens to make room for after the sequences; text is active in every layer.

    Raises:
        MegavlmError: If what is not given would decide which tokens are active.
    """

    def __init__(
        self,
        *,
        model: Callable,
        samples: Sequence[EncodedSample],
        prompt_lengths: Sequence[int],
        costing: Costing,
        device: torch.device,
        num_more: int = 0,
    ):
        self.model = model
        self.device = device
        pack = build_pack(list(samples), costing, num_sources=1, lane=0, step=0, seed=0)
        check_start(pack, prompt_lengths)
        self.pack = pack.to(device)
        self.lengths_B = torch.tensor(pack.sequences.lengths, device=device)
        self.starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        self.place_B = torch.tensor(list(prompt_lengths), device=device)
        self.capacity = max(pack.sequences.lengths) + num_more
        self.longest = max(prompt_lengths)
        """Tokens so far of the longest sequence."""
        self.all_B = torch.arange(len(prompt_lengths), device=device)
        self.caches: dict[int, LayerCache] = {}
        self.gates: dict[tuple[int, int], _GateCounts] = {}
        """Counts of the gates of a stage for a task."""

    def start(self) -> torch.Tensor:
        """Read the prompts; logits ``[B, V]`` of the token after each, in float32 or wider."""
        return self.model(self._prefill)

    def feed(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append a token to each sequence; logits ``[B, V]`` of the next."""
        self.longest += 1
        logits_BV = self.model(lambda backbone: self._step(backbone, tokens_B))
        self.place_B = self.place_B + 1
        return logits_BV

    def _prefill(self, backbone: Backbone) -> torch.Tensor:
        sequence_T = torch.repeat_interleave(torch.arange(len(self.lengths_B), device=self.device), self.lengths_B)
        is_given_T = self.pack.positions_T < self.place_B[sequence_T]

        def fill_cache(layer: int, active: torch.Tensor | None, _q, k_KHd, v_KHd, _scoring, context: Context):  # noqa: PLR0917 (called by place, as the backbone calls observers)
            cache = self.caches[layer] = LayerCache(len(self.lengths_B), self.capacity, k_KHd)
            rows_K = torch.arange(len(sequence_T), device=self.device) if active is None else active
            bias_K = context.log_sizes_K
            bias_K = k_KHd.new_zeros(len(rows_K)) if bias_K is None else bias_K.to(k_KHd.dtype)
            if (guests := context.guests) is not None:
                stage = next(stage for stage in self.pack.route.stages if stage.first_layer <= layer < stage.end_layer)
                rows_R = torch.cat([injection.rows_R for injection in stage.injections])
                rows_K = torch.cat([rows_K, rows_R])
                k_KHd, v_KHd = torch.cat([k_KHd, guests.k_RHd]), torch.cat([v_KHd, guests.v_RHd])
                bias_K = torch.cat([bias_K, bias_K.new_zeros(len(rows_R))])
                # in the pack's order: windows count keys
                order = rows_K.argsort()
                rows_K, k_KHd, v_KHd, bias_K = rows_K[order], k_KHd[order], v_KHd[order], bias_K[order]
            is_given = is_given_T[rows_K]
            cache.fill(sequence_T[rows_K][is_given], k_KHd[is_given], v_KHd[is_given], bias_K[is_given])

        hooks = []
        for s, stage in enumerate(self.pack.route.stages):
            for choice in stage.choices:
                if choice.plan.how == "gate":
                    counts = self.gates[s, choice.task] = _GateCounts(choice, self.pack.route, is_given_T)
                    gate = backbone.gates[f"{choice.task}_{stage.first_layer}"]
                    hooks.append(gate.register_forward_hook(counts.count_given))
        h_TD, _ = backbone.hidden_states(self.pack, fill_cache)
        for hook in hooks:
            hook.remove()
        return self._logits(backbone, h_TD[self.starts_B + self.place_B - 1])

    def _step(self, backbone: Backbone, tokens_B: torch.Tensor) -> torch.Tensor:
        model = backbone.causal_lm.model
        embedding_BD = h_BD = embed(backbone.causal_lm, tokens_B)
        tables = rotary_tables(model, h_BD, self.place_B)
        is_placeholder_B = self.place_B < self.lengths_B
        rows_B = torch.where(is_placeholder_B, self.starts_B + self.place_B, -1)
        for s, stage in enumerate(self.pack.route.stages):
            self._inject(backbone, stage, rows_B, embedding_BD)
            going = self._decide(backbone, s, stage, rows_B, h_BD=h_BD)
            if going is None:
                chosen_K, num_keys, parts = self.all_B, self.longest, WHOLE
                x_KD, rotary = h_BD, tables
            else:
                # the host waits here, once a stage and token: for how many go on, and for their longest cache
                lengths_B = self.caches[stage.first_layer].lengths_B
                most_keys = (lengths_B + going.active_B).max()
                sums = torch.stack([most_keys, *(mask_B.sum() for mask_B in (going.active_B, going.asks_B, going.mlp_B))])
                num_keys, num_active, num_asking, num_mlp = sums.tolist()
                if num_active == 0:  # stock layers take no empty input; all ranks draw the same and skip together
                    continue
                chosen_K = _where(going.active_B, num_active)
                asking_P = None if stage.asking_K is None else _where(going.asks_B[chosen_K], num_asking)
                mlp_P = None if stage.mlp_K is None else _where(going.mlp_B[chosen_K], num_mlp)
                parts = Parts(asking_P, mlp_P)
                x_KD, rotary = h_BD[chosen_K], {kind: (cos_B[chosen_K], sin_B[chosen_K]) for kind, (cos_B, sin_B) in tables.items()}
            for layer in range(stage.first_layer, stage.end_layer):
                context = CacheView(self.caches[layer], chosen_K, num_keys)
                places = tuple(table[None] for table in rotary[kind_of(model, layer)])
                with in_parts(model.layers[layer], parts):
                    given = {"position_embeddings": places, "use_cache": False, "context": context}
                    x_KD = model.layers[layer](x_KD[None], attention_mask=None, **given)[0]
            if going is not None and going.gate_B is not None:
                before_KD = h_BD[chosen_K]
                x_KD = before_KD + going.gate_B[chosen_K, None].to(h_BD.dtype) * (x_KD - before_KD)
            h_BD = x_KD if going is None else h_BD.index_copy(0, chosen_K, x_KD)
        return self._logits(backbone, h_BD)

    def _inject(self, backbone: Backbone, stage: Stage, rows_B: torch.Tensor, embedding_BD: torch.Tensor) -> None:
        """Put keys and values of tokens that do not travel into the caches of a stage."""
        for injection in stage.injections:
            chosen_K = self._stand_at(rows_B, injection.rows_R).nonzero()[:, 0]
            if len(chosen_K) == 0:
                continue
            for layer in range(stage.first_layer, stage.end_layer):
                k_KHd, v_KHd = backbone.injectors[f"{injection.task}_{layer}"](embedding_BD[chosen_K])
                self.caches[layer].append(chosen_K, k_KHd, v_KHd)

    def _decide(self, backbone: Backbone, s: int, stage: Stage, rows_B: torch.Tensor, *, h_BD: torch.Tensor) -> "_Going | None":
        """Which sequences' tokens go through a stage, and through what of it; None if all go through everything."""
        if stage.active_K is None and stage.asking_K is None and stage.mlp_K is None:
            return None
        active_B, asks_B, mlp_B = (self._stand_among(rows_B, rows_K) for rows_K in (stage.active_K, stage.asking_K, stage.mlp_K))
        going = _Going(active_B, active_B & asks_B, active_B & mlp_B)
        for choice in stage.choices:
            if choice.plan.how == "gate":
                logit_B = at_least_float32(backbone.gates[f"{choice.task}_{stage.first_layer}"](h_BD)[:, 0])
                is_candidate_B, goes_B = self.gates[s, choice.task].decide(rows_B, logit_B > 0)
                going.add(is_candidate_B & goes_B)
                gate_B = logit_B.new_ones(len(rows_B)) if going.gate_B is None else going.gate_B
                going.gate_B = torch.where(is_candidate_B, logit_B.sigmoid(), gate_B)
            else:
                # of the spans that may be fed, all tokens are active or none: `check_start` has refused the others
                rows_C = self.pack.route.candidates[choice.task].rows_C
                going.add(self._stand_at(rows_B, rows_C, choice.quota_C > 0))
        return going

    def _stand_among(self, rows_B: torch.Tensor, rows_K: torch.Tensor | None) -> torch.Tensor:
        """Which of some rows are among others, None being all, or are text behind the sequences."""
        return torch.ones_like(rows_B, dtype=torch.bool) if rows_K is None else self._stand_at(rows_B, rows_K) | (rows_B < 0)

    def _stand_at(self, rows_B: torch.Tensor, rows_K: torch.Tensor, which_K: torch.Tensor | None = None) -> torch.Tensor:
        """Which of some rows are among others, ``which_K`` of those. (`torch.isin` makes the host wait.)"""
        which_K = torch.ones_like(rows_K, dtype=torch.bool) if which_K is None else which_K
        # a last place for -1, a row that is none
        is_there_T = which_K.new_zeros(self.pack.num_tokens + 1).index_copy(0, rows_K, which_K)
        return is_there_T.index_select(0, rows_B % len(is_there_T))

    def _logits(self, backbone: Backbone, h_BD: torch.Tensor) -> torch.Tensor:
        return at_least_float32(logits_of(backbone.causal_lm, final_norm(backbone.causal_lm, h_BD)))


@dataclass
class _Going:
    """Which of B tokens go through a stage."""

    active_B: torch.Tensor
    asks_B: torch.Tensor
    """Which of the active ones do more than give keys and values."""
    mlp_B: torch.Tensor
    """Which of the active ones go through the MLP."""
    gate_B: torch.Tensor | None = None
    """What the stage's outcome is scaled by, if by anything."""

    def add(self, is_chosen_B: torch.Tensor) -> None:
        """Tokens that go through everything."""
        self.active_B, self.asks_B, self.mlp_B = (mask_B | is_chosen_B for mask_B in (self.active_B, self.asks_B, self.mlp_B))


def _where(mask_B: torch.Tensor, num: int) -> torch.Tensor:
    """Where a mask with ``num`` set places is set; the host need not wait for how many those are."""
    return mask_B.long().argsort(descending=True, stable=True)[:num]


class _GateCounts:
    """Runs the quota of `megavlm.routing.gates.causal_quota` token by token.

    Args:
        choice: Choice of the gate.
        route: Route of the whole sequences.
        is_given_T: The tokens whose gates are counted when the prompts are read.
    """

    def __init__(self, choice: Choice, route: Route, is_given_T: torch.Tensor):
        self.among = route.candidates[choice.task]
        self.is_given_T = is_given_T
        self.quota_T = torch.zeros(len(is_given_T), dtype=torch.int64, device=is_given_T.device)
        self.left_T = torch.zeros_like(self.quota_T)
        self.span_T = torch.full_like(self.quota_T, -1)
        self.quota_T[self.among.rows_C] = choice.quota_C
        self.left_T[self.among.rows_C] = self.among.left_C
        self.span_T[self.among.rows_C] = self.among.span_C
        self.opened_N = self.quota_T.new_zeros(len(self.among.lengths) + 1)
        """Open gates so far of each span, and one place for rows that are in none."""

    def count_given(self, _gate, _inputs, logit_C1: torch.Tensor) -> None:
        """A forward hook of the gate: count the given tokens whose gates are open."""
        is_open_C = (logit_C1[:, 0] > 0) & self.is_given_T[self.among.rows_C]
        self.opened_N = self.opened_N.index_add(0, self.among.span_C, is_open_C.long())

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
        self.k_BLHd = like_KHd.new_zeros(shape)
        self.v_BLHd = like_KHd.new_zeros(shape)
        self.bias_BL = like_KHd.new_zeros(shape[:2])
        self.lengths_B = torch.zeros(num_sequences, dtype=torch.int64, device=like_KHd.device)

    def fill(self, sequence_K, k_KHd, v_KHd, bias_K) -> None:
        """Put keys of any sequences into the empty cache; those of one sequence keep their order."""
        order = sequence_K.argsort(stable=True)
        sequence_K = sequence_K[order]
        self.lengths_B = torch.bincount(sequence_K, minlength=len(self.lengths_B))
        first_B = self.lengths_B.cumsum(0) - self.lengths_B
        place_K = torch.arange(len(order), device=order.device) - first_B[sequence_K]
        self.k_BLHd[sequence_K, place_K] = k_KHd[order]
        self.v_BLHd[sequence_K, place_K] = v_KHd[order]
        self.bias_BL[sequence_K, place_K] = bias_K[order]

    def append(self, chosen_K: torch.Tensor, k_KHd: torch.Tensor, v_KHd: torch.Tensor) -> None:
        """One more key and value for each of some sequences."""
        self.k_BLHd[chosen_K, self.lengths_B[chosen_K]] = k_KHd
        self.v_BLHd[chosen_K, self.lengths_B[chosen_K]] = v_KHd
        self.lengths_B = self.lengths_B.index_add(0, chosen_K, torch.ones_like(chosen_K))


@dataclass
class CacheView:
    """The attention context of a decoding step: one query for each of some sequences."""

    cache: LayerCache
    chosen_K: torch.Tensor
    num_keys: int
    """Keys of the longest sequence of the cache, those of this step included."""

    def attend(self, q_KHd: torch.Tensor, k_KHd: torch.Tensor, v_KHd: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Append the keys and values; attention of each query to its sequence's keys, ``[K, H, d]``."""
        cache, chosen = self.cache, self.chosen_K
        cache.append(chosen, k_KHd, v_KHd)
        lengths_K = cache.lengths_B[chosen]
        longest = self.num_keys
        is_seen_KL = torch.arange(longest, device=chosen.device) < lengths_K[:, None]
        if scoring.window is not None:
            is_seen_KL &= torch.arange(longest, device=chosen.device) >= lengths_K[:, None] - scoring.window
        bias_KL = cache.bias_BL[chosen, :longest].masked_fill(~is_seen_KL, -torch.inf)
        groups = q_KHd.shape[1] // k_KHd.shape[1]
        k_KHLd, v_KHLd = (x[chosen, :longest].transpose(1, 2).repeat_interleave(groups, dim=1) for x in (cache.k_BLHd, cache.v_BLHd))
        if scoring.softcap is not None:
            scores_KHL = scoring.capped(torch.einsum("khd,khld->khl", q_KHd, k_KHLd) * scoring.scale) + bias_KL[:, None].to(q_KHd.dtype)
            return torch.einsum("khl,khld->khd", at_least_float32(scores_KHL).softmax(-1).to(v_KHLd.dtype), v_KHLd)
        out = functional.scaled_dot_product_attention(
            q_KHd[:, :, None], k_KHLd, v_KHLd, attn_mask=bias_KL[:, None, None].to(q_KHd.dtype), scale=scoring.scale
        )
        return out[:, :, 0]
