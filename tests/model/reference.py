"""The independent reference: routes as the documentation tells them, one document at a time, with loops and masks, in float64.

Shares no code with megavlm: weights are read by name, the decoder (Llama, Qwen2, Qwen3) is written out, the policies' layers are restated
from docs/routing.md, and every token goes through every layer; what is inactive is masked as a key and its outcome thrown away. Of the
route it takes one thing: what chance decided, and only if one ranking per span and draw explains every layer.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from megavlm.routing import selectors as routing_selectors  # to record what chance decides, no more

READ, DRAWN = 0, 1
CHANCE = ("random", "stratified")


class Plan(NamedTuple):
    keep: float = 1.0
    draw: int = 0
    nested: bool = False
    how: str = "select"


def documented_plans(policy, num_layers: int) -> list[Plan]:
    """The table of docs/routing.md."""
    everything, layers = Plan(), range(num_layers)
    end = getattr(policy, "end_layer", 0) or 0
    end = end + num_layers if end < 0 else end
    if policy.policy == "dense":
        return [everything] * num_layers
    if policy.policy == "late_drop":
        return [everything if i < policy.after_layer else Plan(0.0) for i in layers]
    if policy.policy == "late_entry":
        return [Plan(0.0) if i < policy.at_layer else everything for i in layers]
    if policy.policy == "pyramid":
        return [Plan(policy.keep_ratio ** (i * policy.num_parts // num_layers), i * policy.num_parts // num_layers, True) for i in layers]
    if policy.policy == "random_ltd":
        return [everything if i in (0, num_layers - 1) else Plan(policy.keep_ratio, i) for i in layers]
    if policy.policy in ("tread", "shared_bypass"):
        return [Plan(policy.keep_ratio, 1) if policy.first_layer <= i < end else everything for i in layers]
    if policy.policy == "visible_bypass":
        return [Plan(policy.keep_ratio, 1, how="show") if policy.first_layer <= i < end else everything for i in layers]
    if policy.policy == "sparse_mlp":
        return [Plan(policy.keep_ratio, i, how="skip_mlp") if policy.first_layer <= i < end else everything for i in layers]
    if policy.policy == "mixture_of_depths":
        return [Plan(policy.keep_ratio, i, how="gate") if i % 2 and i < num_layers - 1 else everything for i in layers]
    if policy.policy == "kv_injection":
        return [Plan(0.0, how="inject")] * num_layers
    if policy.policy == "merge":
        return [everything if i < policy.at_layer else Plan(policy.keep_ratio, how="merge") for i in layers]
    return [Plan(*plan) for plan in policy.layers(num_layers)]  # of a user: these are its documentation


@contextmanager
def recorded_chance():
    """What the selectors of chance hand out meanwhile."""
    originals, drawn = {name: routing_selectors.HOST_SELECTORS[name] for name in CHANCE}, []

    def recording(name):
        def select(height, width, rng):
            drawn.append(originals[name](height, width, rng))
            return drawn[-1]

        return select

    routing_selectors.HOST_SELECTORS.update({name: recording(name) for name in CHANCE})
    try:
        yield drawn
    finally:
        routing_selectors.HOST_SELECTORS.update(originals)


class Seen(NamedTuple):
    """What a content selector may look at, of one image."""

    h: torch.Tensor
    """The document's residual stream before the layer ``[n, D]``."""
    q: torch.Tensor
    """Queries before rotary embedding, of the last layer in which each token was active ``[n, H, d]``."""
    k: torch.Tensor
    places: list[int]
    height: int
    width: int
    question: list[int]


def key_norm(seen: Seen) -> list[float]:
    return [-float((seen.k[p] ** 2).sum()) for p in seen.places]


def redundancy(seen: Seen) -> list[float]:
    scores = []
    for i, place in enumerate(seen.places):
        y, x = divmod(i, seen.width)
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        near = [seen.places[a * seen.width + b] for a, b in near if 0 <= a < seen.height and 0 <= b < seen.width]
        cosines = [float(functional.cosine_similarity(seen.h[place], seen.h[p], dim=0)) for p in near]
        scores.append(-sum(cosines) / len(cosines) if cosines else 0.0)
    return scores


def question_attention(seen: Seen) -> list[float]:
    if not seen.question:
        return [0.0] * len(seen.places)
    query = seen.q[seen.question].mean(0)
    weights = torch.einsum("hd,lhd->hl", query, seen.k[seen.places]) / math.sqrt(query.shape[1])
    return weights.softmax(1).mean(0).tolist()


CONTENT: dict[str, Callable[[Seen], list[float]]] = {
    "key_norm": key_norm,
    "redundancy": redundancy,
    "question_attention": question_attention,
}


def bayer(height: int, width: int) -> np.ndarray:
    """The ordered-dither matrix by its recursion, cut to the grid."""
    matrix = np.zeros((1, 1))
    while len(matrix) < max(height, width):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return matrix[:height, :width].ravel()


class Reference:
    """Documents along the routes of two policies.

    Args:
        backbone: For its weights.
        samples: The documents.
        policies: For images that are read and that are drawn.
        strength: Of the schedule.
        route: Of a pack of the documents: says what chance chose.
        drawn: What `recorded_chance` recorded when it was built.
    """

    def __init__(self, backbone, samples, policies, strength=1.0, route=None, drawn=()):
        self.weights = dict(backbone.named_parameters())
        self.config = backbone.causal_lm.config
        self.samples, self.policies, self.strength = samples, policies, strength
        self.plans = [documented_plans(policy, self.config.num_hidden_layers) for policy in policies]
        self.drawn, self.route, self.options = drawn, route, {}

    def streams(self) -> list[torch.Tensor]:
        """The residual stream of every document after the last layer ``[n, D]``."""
        self.gate_loss, (self.active, self.attention, self.travelling) = 0.0, ([[] for _ in self.samples] for _ in range(3))
        return [self._document(d) for d in range(len(self.samples))]

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        head = self.weights.get("causal_lm.lm_head.weight", self.weights["causal_lm.model.embed_tokens.weight"])
        return self._norm("norm", h) @ head.T

    def losses(self) -> torch.Tensor:
        """Sums of cross-entropy per task, and of the gates' loss, as the backbone gives them for one source."""
        # nothing may have a loss
        sums = [0 * self.weights["causal_lm.model.norm.weight"].sum().float()] * 3
        for sample, h in zip(self.samples, self.streams()):
            logits = self.logits(h)
            for place in np.flatnonzero(sample.has_loss):
                task = int(sample.tasks[place])
                sums[task] = sums[task] + functional.cross_entropy(logits[place - 1].float(), torch.tensor(sample.tokens[place]))
        return torch.stack([*sums, torch.as_tensor(self.gate_loss, dtype=torch.float32)])

    def _document(self, d: int) -> torch.Tensor:
        sample, config = self.samples[d], self.config
        n, self._seen = len(sample.tokens), self.attention[d]
        heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        embedding = h = self.weights["causal_lm.model.embed_tokens.weight"][torch.from_numpy(sample.tokens)]
        images = [(span.start, span.height, span.width, DRAWN if span.has_loss else READ) for span in sample.spans]
        of_image = {start + i for start, height, wide, _ in images for i in range(height * wide)}
        labelled = np.flatnonzero(sample.has_loss).tolist()
        prompt = [p for p in range((labelled[0] if labelled else n) - 1) if p not in of_image] if sample.task == DRAWN else []
        q_seen = k_seen = torch.zeros(n, heads, width, dtype=h.dtype)
        sizes, before, scores, merged = torch.ones(n, dtype=h.dtype), {}, {}, {}
        for layer in range(config.num_hidden_layers):
            active, guests, gate = set(range(n)), {}, torch.ones(n, dtype=h.dtype)
            shown, without_mlp = set(), set()
            if self.plans[DRAWN][layer].how == "inject":
                guests |= dict.fromkeys(prompt, DRAWN)
            for i, (start, height, wide, task) in enumerate(images):
                places, plan = list(range(start, start + height * wide)), self.plans[task][layer]
                kept = self._kept(plan, len(places))
                if plan.how == "inject":
                    chosen = places if task == DRAWN else []
                    guests |= {} if task == DRAWN else dict.fromkeys(places, READ)
                elif plan.how == "gate":
                    chosen = self._gated(f"gates.{task}_{layer}", h, places, kept, gate)
                elif kept == len(places) and (plan.keep == 1 or plan.how == "merge"):
                    chosen = places
                elif plan.how == "merge":
                    if i not in merged:
                        h, merged[i] = self._merged(h, k_seen, places, kept, sizes)
                    chosen = merged[i]
                else:
                    among = before.get(i, places) if plan.nested else places
                    name = getattr(self.policies[task], "selector", "random")
                    if name in CHANCE:
                        chosen = self._by_chance(d, i, layer, places, among, kept, plan)
                    else:
                        if (i, plan.draw) not in scores:
                            end = start + len(places)
                            stop = min([p for p in labelled if p >= end], default=n)
                            question = [p for p in range(end, stop) if p not in of_image]
                            seen = Seen(h.detach(), q_seen, k_seen, places, height, wide, question)
                            scores[i, plan.draw] = -bayer(height, wide) if name == "stride" else CONTENT[name](seen)
                        # the highest score first, in float32; then the first in the image
                        key = dict(zip(places, np.asarray(scores[i, plan.draw], np.float32).tolist()))
                        chosen = sorted(sorted(among, key=lambda p: (-key[p], p))[:kept])
                assert len(chosen) == kept or plan.how == "inject"
                before[i] = chosen
                left_out = set(places) - set(chosen)
                if plan.how == "skip_mlp":
                    without_mlp |= left_out
                else:
                    active -= left_out
                    shown |= left_out if plan.how == "show" else set()
            active -= set(guests)
            seen = active | shown
            out, q, k = self._layer(layer, h, embedding, seen, guests, sizes.log(), groups, width, without_mlp=sorted(without_mlp))
            is_active = torch.tensor([p in active for p in range(n)])
            self.active[d].append(is_active)
            self.travelling[d].append(len(seen))
            q_seen, k_seen = (torch.where(is_active[:, None, None], x.detach(), old) for x, old in ((q, q_seen), (k, k_seen)))
            h = torch.where(is_active[:, None], h + gate[:, None] * (out - h), h)
        return h

    def _kept(self, plan: Plan, length: int) -> int:
        share = 1 - (1 - plan.keep) * self.strength
        return 0 if share == 0 else max(1, math.ceil(length * share - 1e-9))

    def _layer(self, layer, h, embedding, active, guests, log_sizes, groups, width, *, without_mlp):
        """The outcome for every token as if it were active; queries and keys before rotary embedding."""
        n, name = len(h), f"layers.{layer}."
        x = self._norm(name + "input_layernorm", h)
        q, k, v = (self._linear(f"{name}self_attn.{p}_proj", x).unflatten(1, (-1, width)) for p in "qkv")
        if f"causal_lm.model.{name}self_attn.q_norm.weight" in self.weights:
            q, k = self._norm(name + "self_attn.q_norm", q), self._norm(name + "self_attn.k_norm", k)
        plain_q, plain_k = q, k.repeat_interleave(groups, 1)
        q, k = self._rotated(q), self._rotated(k)
        for task in (READ, DRAWN):
            rows = [p for p, of in guests.items() if of == task]
            if rows:
                part = f"injectors.{task}_{layer}."
                e = embedding[rows]
                e = e / (e.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[part + "norm.weight"]
                k = k.index_copy(0, torch.tensor(rows), (e @ self.weights[part + "k_proj.weight"].T).unflatten(1, (-1, width)))
                v = v.index_copy(0, torch.tensor(rows), (e @ self.weights[part + "v_proj.weight"].T).unflatten(1, (-1, width)))
        allowed = torch.zeros(n, n, dtype=torch.bool)
        for place in range(n):
            for other in range(place + 1):
                # an inactive token sees itself, so that what is thrown away is a number
                allowed[place, other] = other in active or other in guests or other == place
            if window := getattr(self.config, "sliding_window", None):  # of the rows that take part, the last so many
                allowed[place, allowed[place].nonzero()[:-window, 0]] = False
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width) + log_sizes
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        self._seen.append(weights.detach())
        mixed = torch.einsum("hqk,khd->qhd", weights, v)
        h = h + self._linear(name + "self_attn.o_proj", mixed.flatten(1))
        x = self._norm(name + "post_attention_layernorm", h)
        inner = functional.silu(self._linear(name + "mlp.gate_proj", x)) * self._linear(name + "mlp.up_proj", x)
        of_mlp = self._linear(name + "mlp.down_proj", inner)
        return h + of_mlp.index_fill(0, torch.tensor(without_mlp, dtype=torch.int64), 0.0), plain_q, plain_k

    def _linear(self, name, x):
        bias = self.weights.get(f"causal_lm.model.{name}.bias")
        y = x @ self.weights[f"causal_lm.model.{name}.weight"].T
        return y if bias is None else y + bias

    def _norm(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weights[f"causal_lm.model.{name}.weight"]

    def _rotated(self, x):
        half = x.shape[2] // 2
        frequency = self.config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(len(x))[:, None] * frequency)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _by_chance(self, d, i, layer, places, among, kept, plan):
        """What the route kept of an image, if a single ranking of this draw explains it here as in the layers before."""
        stage = next(stage for stage in self.route.stages if stage.first_layer <= layer < stage.end_layer)
        offset = sum(len(sample.tokens) for sample in self.samples[:d])
        draw = plan.draw
        rows_K = {"skip_mlp": stage.mlp_K, "show": stage.asking_K}.get(plan.how, stage.active_K)
        rows = None if rows_K is None else set(rows_K.tolist())
        chosen = [p for p in places if rows is None or offset + p in rows]
        if kept == len(places):
            return chosen
        options = self.options.get((d, i, draw), [scores for scores in self.drawn if len(scores) == len(places)])
        of_place = [dict(zip(places, scores)) for scores in options]
        fits = [s for s, key in zip(options, of_place) if sorted(sorted(among, key=key.__getitem__)[:kept]) == chosen]
        assert fits or not kept, "no ranking of the draw explains what was chosen"
        self.options[d, i, draw] = fits if kept else options
        return chosen

    def _gated(self, name, h, places, kept, gate):
        logits = h[places] @ self.weights[name + ".weight"][0] + self.weights[name + ".bias"][0]
        gate[places] = logits.sigmoid()
        picked = []
        for i, logit in enumerate(logits.tolist()):
            must = kept - len(picked) == len(places) - i
            if must or (logit > 0 and len(picked) < kept):
                picked.append(places[i])
        top = torch.zeros_like(logits)
        top[logits.detach().sort(descending=True, stable=True).indices[:kept]] = 1.0
        self.gate_loss = self.gate_loss + functional.binary_cross_entropy_with_logits(logits, top, reduction="sum")
        return picked

    def _merged(self, h, k_seen, places, kept, sizes):
        keys = functional.normalize(k_seen[places].mean(1), dim=1)
        fixed, movable = list(range(0, len(places), 2)), list(range(1, len(places), 2))
        closest = {m: max(fixed, key=lambda f: float(keys[m] @ keys[f])) for m in movable}
        gone = sorted(movable, key=lambda m: -float(keys[m] @ keys[closest[m]]))[: len(places) - kept]
        met = {f: [f, *(m for m in gone if closest[m] == f)] for f in fixed}
        new = h.clone()
        for f, group in met.items():
            new[places[f]] = sum(h[places[g]] for g in group) / len(group)
            sizes[places[f]] = len(group)
        return new, [p for i, p in enumerate(places) if i not in gone]


class ExactNorm(nn.Module):
    """A stock norm in the precision of its input: theirs is in float32 whatever they are given."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide / (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()).to(x.dtype)


class ExactRotary(nn.Module):
    """Stock rotary tables in the precision of the hidden states, likewise."""

    @torch.no_grad()
    def forward(self, x, position_ids):
        half = len(self.inv_freq)
        exponents = torch.arange(half, dtype=torch.float64, device=x.device) / half
        angle = position_ids[..., None] * self.config.rope_parameters["rope_theta"] ** -exponents
        table = torch.cat([angle, angle], -1)
        return table.cos().to(x.dtype), table.sin().to(x.dtype)


def make_exact(backbone):
    """Swap what computes in float32 in the stock model, so that a float64 model is one."""
    for module in backbone.causal_lm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = ExactNorm
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.__class__ = ExactRotary
    return backbone
