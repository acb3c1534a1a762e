"""Keys and values without travelling: the modules of the control arms `kv_injection`.

Letters: R rows that give only keys and values.

Tested by `tests/model/test_backbone.py`.
"""

import torch
from torch import nn


class Injector(nn.Module):
    """A norm and projections of one layer, for tokens that give only keys and values to it (HiMix, arXiv 2501.10318).

    Args:
        width: D.
        num_kv_heads: Key/value heads.
        head_width: d.
        eps: Epsilon of the norm.
    """

    def __init__(self, width: int, num_kv_heads: int, head_width: int, eps: float = 1e-6):
        super().__init__()
        self.head_width = head_width
        self.norm = nn.RMSNorm(width, eps=eps)
        self.k_proj = nn.Linear(width, num_kv_heads * head_width, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_width, bias=False)
        for projection in (self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=0.02)

    def forward(self, embedding_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[R, Hkv, d]``; no rotary embedding."""
        normed_RD = self.norm(embedding_RD)
        return tuple(p(normed_RD).unflatten(1, (-1, self.head_width)) for p in (self.k_proj, self.v_proj))
