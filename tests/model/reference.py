"""The dense reference: computes with masks and loops what the router computes with gathers and closed forms.

Every row goes through every layer; rows that are inactive in a layer are masked as keys, and their outputs are thrown away. Choices are
made anew, naively, span by span. It reads the pack's tokens and layout and the plan, and of the route only what chance decided.
"""

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

from megavlm.model.backbone import Backbone
from megavlm.routing.plan import num_kept
from megavlm.routing.tasks import Task


def _attention(module, query, key, value, attention_mask, *, scaling, guests, **_unused):
    groups = query.shape[1] // key.shape[1]
    if guests is not None:
        rows, k_RHd, v_RHd = guests
        key, value = (x.index_copy(2, rows, new.transpose(0, 1)[None]) for x, new in ((key, k_RHd), (value, v_RHd)))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("reference", _attention)


class Reference:
    """One pack through a backbone; ``losses()`` is like ``backbone(pack)``, ``active`` tells which rows each layer saw."""

    def __init__(self, backbone: Backbone, pack, samples, plan, strength: float = 1.0):
        self.backbone, self.pack, self.samples, self.plan, self.strength = backbone, pack, samples, plan, strength
        offsets = np.cumsum([0] + [sample.num_tokens for sample in samples])
        self.spans = [(s, offset, span) for s, offset in zip(samples, offsets) for span in s.spans]
        self.prompts = [offset + place for s, offset in zip(samples, offsets) for place in s.prompt_places]
        self.gate_loss = 0.0
        self.active = []

    def losses(self) -> torch.Tensor:
        lm, pack = self.backbone.causal_lm, self.pack
        model = lm.model
        lm.config._attn_implementation = "reference"
        num = pack.num_tokens
        document = torch.repeat_interleave(torch.arange(len(pack.sequences.lengths)), torch.tensor(pack.sequences.lengths))
        inside = torch.ones(num, num, dtype=torch.bool).tril() & (document[:, None] == document)
        embedding = h = model.embed_tokens(pack.tokens_T)
        rotary = model.rotary_emb(h[None], pack.positions_T[None])
        sizes, chosen, alive, seen = torch.ones(num, dtype=h.dtype), {}, {}, None
        for s, (first, end) in enumerate(self.plan.bounds):
            is_active = torch.ones(num, dtype=torch.bool)
            gate = torch.ones(num, dtype=h.dtype)
            guest_rows = []
            for task, plan in enumerate(self.plan.plans[s]):
                if plan.how == "inject" and task == Task.GENERATION:
                    is_active[self.prompts] = False
                    guest_rows.append((task, torch.tensor(self.prompts, dtype=torch.int64)))
                if plan.how == "inject" and task == Task.UNDERSTANDING:
                    rows = [offset + span.start + i for _, offset, span in self.spans if span.task == task for i in range(span.length)]
                    is_active[rows] = False
                    guest_rows.append((task, torch.tensor(rows, dtype=torch.int64)))
            for n, (sample, offset, span) in enumerate(self.spans):
                plan = self.plan.plans[s][span.task]
                if plan.how == "inject":
                    continue
                rows = torch.arange(offset + span.start, offset + span.start + span.length)
                ratio = 1 - (1 - plan.keep_ratio) * self.strength
                kept = int(num_kept(np.array(span.length), np.array(ratio)))
                is_active[rows] = False
                if plan.how == "gate":
                    picked = self._gated(f"{span.task}_{first}", h, rows, kept, gate)
                elif not self.plan.is_device_choice(span.task, plan) or plan.keep_ratio == 1:
                    route_stage = pack.route.stages[s]
                    open_rows = torch.arange(num) if route_stage.active_K is None else route_stage.active_K
                    picked = rows[torch.isin(rows, open_rows)]
                    assert len(picked) == kept
                    alive[n] = set(rows.tolist())
                elif plan.how == "merge":
                    if n not in chosen:
                        h, chosen[n] = self._merged(h, seen[1], rows, kept, sizes)
                    picked = chosen[n]
                else:
                    if (n, plan.draw) not in chosen:
                        among = alive.get(n, set(rows.tolist())) if plan.nested else set(rows.tolist())
                        chosen[n, plan.draw] = self._scored(span, sample, offset, rows, h, seen, among)
                    picked = chosen[n, plan.draw][:kept]
                    alive[n] = set(picked.tolist())
                is_active[picked] = True
            before, merges = h, bool((sizes > 1).any())
            for layer in range(first, end):
                attends = is_active.clone()
                guests = None
                if guest_rows:
                    made = [self.backbone.injectors[f"{task}_{layer}"](embedding[rows]) for task, rows in guest_rows]
                    rows = torch.cat([rows for _, rows in guest_rows])
                    guests = (rows, torch.cat([k for k, _ in made]), torch.cat([v for _, v in made]))
                    attends[rows] = True
                # inactive rows see themselves, so that their thrown-away outputs are numbers
                allowed = (inside & attends) | torch.eye(num, dtype=torch.bool)
                mask = torch.zeros(num, num, dtype=h.dtype).masked_fill(~allowed, -torch.inf)
                if merges:
                    mask = mask + sizes.log()
                module = model.layers[layer]
                new_seen = _queries_and_keys(module, h)
                seen = new_seen if seen is None else [torch.where(is_active[:, None, None], n, o) for n, o in zip(new_seen, seen)]
                out = module(h[None], attention_mask=mask[None, None], position_embeddings=rotary, guests=guests)[0]
                h = torch.where(is_active[:, None], out, h)
                self.active.append(is_active)
            h = torch.where(is_active[:, None], before + gate[:, None] * (h - before), h)
        logits = lm.lm_head(model.norm(h))
        loss_M = functional.cross_entropy(logits[pack.rows_M].float(), pack.targets_M, reduction="none")
        sums = torch.zeros(self.backbone.num_groups).index_add(0, pack.groups_M, loss_M)
        return torch.cat([sums, torch.as_tensor(self.gate_loss, dtype=torch.float32)[None]])

    def _gated(self, name, h, rows, kept, gate):
        logits = self.backbone.gates[name](h[rows])[:, 0].float()
        gate[rows] = logits.sigmoid().to(gate.dtype)
        picked = []
        for i, logit in enumerate(logits.tolist()):
            must = kept - len(picked) == len(rows) - i
            if must or (logit > 0 and len(picked) < kept):
                picked.append(i)
        top = torch.zeros(len(rows))
        top[logits.detach().sort(descending=True, stable=True).indices[:kept]] = 1.0
        self.gate_loss = self.gate_loss + functional.binary_cross_entropy_with_logits(logits, top, reduction="sum")
        return rows[picked]

    def _scored(self, span, sample, offset, rows, h, seen, among):
        selector = self.plan.selectors[span.task]
        if selector == "key_norm":
            score = -seen[1][rows].float().square().sum((1, 2))
        elif selector == "redundancy":
            score = torch.zeros(span.length)
            for i in range(span.length):
                y, x = divmod(i, span.width)
                near = [(y + a, x + b) for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1))]
                near = [rows[a * span.width + b] for a, b in near if 0 <= a < span.height and 0 <= b < span.width]
                cosines = [functional.cosine_similarity(h[rows[i]].float(), h[r].float(), dim=0) for r in near]
                score[i] = -sum(cosines) / max(1, len(cosines))
        else:
            labelled = [i for i in np.flatnonzero(sample.has_loss) if i >= span.start + span.length]
            end = labelled[0] if labelled else sample.num_tokens
            question = seen[0][offset + span.start + span.length : offset + end].float().mean(0)
            score = torch.einsum("hd,lhd->hl", question, seen[1][rows].float() * seen[1].shape[2] ** -0.5).softmax(1).mean(0)
        dead = torch.tensor([int(row) not in among for row in rows])
        return rows[score.detach().masked_fill(dead, -torch.inf).sort(descending=True, stable=True).indices]

    def _merged(self, h, keys, rows, kept, sizes):
        unit = functional.normalize(keys[rows].float().mean(1), dim=1)
        fixed, movable = rows[0::2], rows[1::2]
        if len(movable) == 0:
            return h, rows
        similarity = unit[1::2] @ unit[0::2].T
        ranked = similarity.max(1).values.sort(descending=True, stable=True).indices
        gone = ranked[: len(rows) - kept]
        total, count = h.clone(), torch.ones(len(h), dtype=h.dtype)
        for i in gone.tolist():
            target = fixed[similarity[i].argmax()]
            total[target] = total[target] + h[movable[i]]
            count[target] += 1
        sizes *= count
        return total / count[:, None], torch.cat([fixed, movable[ranked[len(gone) :]]]).sort().values


def _queries_and_keys(layer, h):
    """Before rotary embedding, ``[T, H, d]`` each."""
    with torch.no_grad():
        attention, x = layer.self_attn, layer.input_layernorm(h)
        q, k = (p(x).unflatten(1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return [q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)]
