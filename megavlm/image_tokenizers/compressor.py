"""UniCompress (arXiv 2603.11320): turns a dense map of image codes into a few global and average-pooled tokens, around any image tokenizer.

    dense codes [h, w] ── embeddings [h, w, D] ─┬─ cross-attention of G learned queries ─▶ G global tokens      [G, D]
                                                └─ means over factor x factor blocks ───▶ M compressed tokens  [M, D]

Understanding reads these tokens as they are (continuous). Generation predicts their nearest entries in a codebook (discrete).
`megavlm.image_tokenizers.decompressor` leads back to dense codes.

Letters: N images, L = h·w dense codes of an image, P = G + M tokens, V dense codes of the tokenizer, K entries
of the plug-in's own codebook, D width of an embedding, W width inside the plug-in.

Where the method leaves room, this was chosen. The plug-in has one codebook of its own for both kinds of tokens, because a mean of
embeddings lies between the tokenizer's codes. It is trained with VQ-VAE's loss (arXiv 1711.00937). Unused entries restart.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from megavlm.settings import Settings

Positive = Annotated[int, Field(gt=0)]
PLACE_STD = 0.5
"""Initial standard deviation of the embeddings of places: as large as the embedded codes, or attention learns places late."""
COMMITMENT = 0.25
"""Weight of the pull on features towards their entries, relative to that on entries (arXiv 1711.00937)."""


class PlugInSettings(Settings):
    """Sizes of a plug-in; written beside its weights."""

    num_dense_codes: Positive
    """V: size of the codebook of the tokenizer inside."""
    height: Positive
    """Rows of dense codes."""
    width: Positive
    """Columns of dense codes."""
    embedding_width: Positive
    """D: width of the tokenizer's codebook, or of the learned embedding of its codes."""
    has_codebook: bool
    """Whether the tokenizer has embeddings of its own; they stay frozen."""
    factor: Literal[2, 4] = 2
    """Side of the block of codes that becomes one token: 2 is 4 times fewer tokens, 4 is 16 times fewer."""
    num_global: Positive = 4
    """G: global tokens per image."""
    codebook_size: Positive = 512
    """K: entries of the plug-in's codebook."""
    hidden_width: Positive = 128
    """W: width inside the plug-in."""
    num_heads: Positive = 4
    """Attention heads."""
    num_layers: Positive = 4
    """Layers of the decompressor."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> "PlugInSettings":
        if self.height % self.factor or self.width % self.factor:
            raise ValueError(f"blocks of {self.factor} x {self.factor} do not fill a grid of {self.height} x {self.width} codes")
        if self.hidden_width % self.num_heads:
            raise ValueError(f"hidden_width {self.hidden_width} is no multiple of num_heads {self.num_heads}")
        return self

    @property
    def num_dense(self) -> int:
        """L: dense codes per image."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """P: tokens per image, the separator not counted."""
        return self.num_global + self.num_dense // self.factor**2


def pool(dense_NhwD: torch.Tensor, factor: int) -> torch.Tensor:
    """Means over blocks of ``factor x factor``, in raster order: ``[N, M, D]``."""
    num, height, width, depth = dense_NhwD.shape
    blocks = dense_NhwD.view(num, height // factor, factor, width // factor, factor, depth)
    return blocks.mean((2, 4)).flatten(1, 2)


class Compressor(nn.Module):
    """Turns dense codes into global and compressed tokens, as features.

    Args:
        settings: Sizes.
        codebook_VD: Embeddings of the tokenizer's codes; None learns an embedding.
    """

    def __init__(self, settings: PlugInSettings, codebook_VD: torch.Tensor | None = None):
        super().__init__()
        self.settings, hidden = settings, settings.hidden_width
        self.embedding = nn.Embedding(settings.num_dense_codes, settings.embedding_width)
        if settings.has_codebook:
            self.embedding.requires_grad_(False)
        if codebook_VD is not None:
            self.embedding.weight.data.copy_(codebook_VD)
        self.into = nn.Linear(settings.embedding_width, hidden)
        self.place_LW = nn.Parameter(PLACE_STD * torch.randn(settings.num_dense, hidden))
        self.query_GW = nn.Parameter(torch.randn(settings.num_global, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, settings.num_heads, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, settings.embedding_width))

    def forward(self, codes_Nhw: torch.Tensor) -> torch.Tensor:
        """Features ``[N, P, D]``: the global tokens, then the compressed ones in raster order."""
        dense_NhwD = self.embedding(codes_Nhw)
        keys_NLW = self.norm(self.into(dense_NhwD.flatten(1, 2)) + self.place_LW)
        queries_NGW = self.query_GW.expand(len(codes_Nhw), -1, -1)
        read_NGW, _ = self.attention(queries_NGW, keys_NLW, keys_NLW, need_weights=False)
        return torch.cat([self.out(read_NGW), pool(dense_NhwD, self.settings.factor)], 1)


class Quantizer(nn.Module):
    """A codebook of K entries; gradients pass through it as if it were not there (arXiv 1308.3432).

    Args:
        num_entries: K, the size of the codebook.
        width: D, the width of an entry.
    """

    def __init__(self, num_entries: int, width: int):
        super().__init__()
        self.entry_KD = nn.Parameter(torch.randn(num_entries, width))

    def nearest(self, x_NPD: torch.Tensor) -> torch.Tensor:
        """Indices of the nearest entries ``[N, P]``."""
        distance_NPK = self.entry_KD.square().sum(1) - 2 * x_NPD @ self.entry_KD.T
        return distance_NPK.argmin(-1)

    def forward(self, x_NPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries ``[N, P, D]`` with the gradient of the features, their indices ``[N, P]``, and the loss of the codebook.

        The loss is in units of the features' variance.
        """
        indices_NP = self.nearest(x_NPD)
        entries_NPD = functional.embedding(indices_NP, self.entry_KD)
        to_entries = (entries_NPD - x_NPD.detach()).square().mean()
        to_features = (entries_NPD.detach() - x_NPD).square().mean()
        loss = (to_entries + COMMITMENT * to_features) / x_NPD.detach().var().clamp(min=1e-6)
        return x_NPD + (entries_NPD - x_NPD).detach(), indices_NP, loss

    @torch.no_grad()
    def begin_anew(self, x_NPD: torch.Tensor, entries: torch.Tensor) -> None:
        """Move entries, given by their indices, onto features picked evenly from a batch, with a little noise so that no two are equal."""
        x_XD = x_NPD.flatten(0, 1)
        chosen = x_XD[torch.linspace(0, len(x_XD) - 1, len(entries)).long()]
        self.entry_KD[entries] = chosen + 0.01 * x_XD.std() * torch.randn_like(chosen)
