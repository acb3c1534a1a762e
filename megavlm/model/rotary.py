"""Queries and keys as they were before the rotary embedding, of any family that is exact here.

Tested by `tests/model/test_families.py`.
"""

import sys
from typing import Any

import torch

from megavlm.model.ends import kind_of
from megavlm.model.families import rotates


def without_rotary(  # noqa: PLR0917 (the backbone binds the first four, selectors give queries and keys by place)
    model: Any, layer: int, cos_Kd: torch.Tensor, sin_Kd: torch.Tensor, q_KHd: torch.Tensor, k_KHd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys back by the angles of their places.

    The family's own function does it, with the angles negated: it knows which channels are pairs. Those behind them are not turned.

    Args:
        model: The decoder, of any family.
        layer: Where the queries and keys come from.
        cos_Kd: Cosines that they were turned by, scaled as the family scales them.
        sin_Kd: Sines, likewise.
        q_KHd: Queries.
        k_KHd: Keys, with their own number of heads.
    """
    attention = model.layers[layer].self_attn
    if not rotates(attention):
        return q_KHd, k_KHd
    kind = kind_of(model, layer)
    scaling = getattr(model.rotary_emb, f"{kind}_attention_scaling" if kind else "attention_scaling")
    if scaling != 1:  # yarn; the angles were scaled once, and would be again
        cos_Kd, sin_Kd = cos_Kd / scaling**2, sin_Kd / scaling**2
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    width = cos_Kd.shape[1]
    turned = (x[None, ..., :width].transpose(1, 2) for x in (q_KHd, k_KHd))
    q_1HKd, k_1HKd = rotate(*turned, cos_Kd[None], -sin_Kd[None])
    back = ((q_1HKd[0].transpose(0, 1), q_KHd), (k_1HKd[0].transpose(0, 1), k_KHd))
    q_KHd, k_KHd = (torch.cat([x, whole[..., width:]], -1) for x, whole in back)
    return q_KHd, k_KHd
