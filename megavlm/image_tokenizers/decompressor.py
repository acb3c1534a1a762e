"""The decompressor (UniCompress, arXiv 2603.11320): global and compressed tokens back to dense codes; and the plug-in as a whole.

The decompressor is a small transformer, autoregressive in raster order. Every layer attends to the dense codes so far (causal
self-attention) and to all global and compressed tokens (cross-attention). It is trained with teacher forcing. Letters are those of
`megavlm.image_tokenizers.compressor`.

The loss of a position has two terms, in our reading: the squared error of a regressed embedding, in units of the embeddings'
variance, and the cross-entropy of the code ("codebook consistency"). Codes have a head of their own, because a regressed mean of two likely
embeddings may lie nearest to a third.

Tested by `tests/image_tokenizers/test_compressor.py`.
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from megavlm.image_tokenizers.compressor import PLACE_STD, Compressor, PlugInSettings, Quantizer, pool

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""``[N, heads, places, d]`` each."""


class Layer(nn.Module):
    """Self-attention, cross-attention and a two-layer network, each on normed input with a residual.

    Args:
        width: W, the width of the stream.
        num_heads: Attention heads.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_self, self.norm_cross, self.norm_wide = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def of_memory(self, memory_NPW: torch.Tensor) -> KeysValues:
        """Keys and values of the global and compressed tokens; the same for every place."""
        keys, values = self._heads(self.kv(memory_NPW), 2)
        return keys, values

    def forward(self, x_NlW: torch.Tensor, memory: KeysValues, before: KeysValues | None) -> tuple[torch.Tensor, KeysValues]:
        """The stream after the layer, and keys and values of all places so far.

        Args:
            x_NlW: The stream: from the first place on, or one place when there is something before.
            memory: Keys and values from `of_memory`.
            before: Keys and values of the places before.
        """
        q, k, v = self._heads(self.qkv(self.norm_self(x_NlW)), 3)
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        read = functional.scaled_dot_product_attention(q, k, v, is_causal=before is None)
        x_NlW = x_NlW + self.self_out(read.transpose(1, 2).flatten(2))
        (asked,) = self._heads(self.q(self.norm_cross(x_NlW)), 1)
        read = functional.scaled_dot_product_attention(asked, *memory)
        x_NlW = x_NlW + self.cross_out(read.transpose(1, 2).flatten(2))
        return x_NlW + self.wide(self.norm_wide(x_NlW)), (k, v)

    def _heads(self, x_Nlw: torch.Tensor, num: int) -> tuple[torch.Tensor, ...]:
        """``num`` tensors ``[N, heads, l, d]``."""
        return tuple(part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in x_Nlw.chunk(num, dim=2))


class Decompressor(nn.Module):
    """Predicts the next dense code from the tokens and the dense codes so far.

    Args:
        settings: Sizes.
    """

    def __init__(self, settings: PlugInSettings):
        super().__init__()
        width, depth = settings.hidden_width, settings.embedding_width
        self.into = nn.Linear(depth, width)
        self.memory_into = nn.Linear(depth, width)
        self.start_D = nn.Parameter(torch.zeros(depth))
        self.place_LW = nn.Parameter(PLACE_STD * torch.randn(settings.num_dense, width))
        # a compressed token starts with the places of its block, so that codes find their tokens in fewer steps
        place_1hwW = self.place_LW.detach().view(1, settings.height, settings.width, width)
        globals_GW = PLACE_STD * torch.randn(settings.num_global, width)
        self.memory_place_PW = nn.Parameter(torch.cat([globals_GW, settings.factor * pool(place_1hwW, settings.factor)[0]]))
        self.layers = nn.ModuleList(Layer(width, settings.num_heads) for _ in range(settings.num_layers))
        self.norm = nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(width)
        self.to_embedding = nn.Linear(width, depth)
        self.to_code = nn.Linear(width, settings.num_dense_codes)

    def forward(self, tokens_NPD: torch.Tensor, dense_NLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Regressed embeddings ``[N, L, D]`` and logits ``[N, L, V]`` of every place, from the right codes before it (teacher forcing).

        Args:
            tokens_NPD: Global and compressed tokens.
            dense_NLD: Embeddings of the right dense codes.
        """
        start_N1D = self.start_D.expand(len(dense_NLD), 1, -1)
        x_NLW, _ = self._run(torch.cat([start_N1D, dense_NLD[:, :-1]], 1), self._memory(tokens_NPD), 0, None)
        return self.to_embedding(x_NLW), self.to_code(x_NLW)

    @torch.no_grad()
    def generate(self, tokens_NPD: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """Dense codes ``[N, L]``, one after another: each is the most likely one after those already restored."""
        memory = self._memory(tokens_NPD)
        x_N1D, cache = self.start_D.expand(len(tokens_NPD), 1, -1), None
        codes: list[torch.Tensor] = []
        for place in range(len(self.place_LW)):
            x_N1W, cache = self._run(x_N1D, memory, place, cache)
            codes.append(self.to_code(x_N1W).argmax(-1))
            x_N1D = embedding(codes[-1])
        return torch.cat(codes, 1)

    def _memory(self, tokens_NPD: torch.Tensor) -> list[KeysValues]:
        """Keys and values of the tokens, for each layer."""
        memory_NPW = self.memory_norm(self.memory_into(tokens_NPD) + self.memory_place_PW)
        return [cast(Layer, layer).of_memory(memory_NPW) for layer in self.layers]

    def _run(
        self, x_NlD: torch.Tensor, memory: list[KeysValues], first: int, cache: list[KeysValues] | None
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        x_NlW = self.into(x_NlD) + self.place_LW[first : first + x_NlD.shape[1]]
        after = []
        for number, layer in enumerate(self.layers):
            x_NlW, keys_values = layer(x_NlW, memory[number], cache[number] if cache else None)
            after.append(keys_values)
        return self.norm(x_NlW), after


class PlugIn(nn.Module):
    """Compressor, codebook and decompressor together.

    Args:
        settings: Sizes.
        codebook_VD: Embeddings of the tokenizer's codes, where it has them and the weights are not loaded.
    """

    def __init__(self, settings: PlugInSettings, codebook_VD: torch.Tensor | None = None):
        super().__init__()
        self.settings = settings
        self.compressor = Compressor(settings, codebook_VD)
        self.quantizer = Quantizer(settings.codebook_size, settings.embedding_width)
        self.decompressor = Decompressor(settings)

    def forward(self, codes_Nhw: torch.Tensor, quantised: bool = True) -> dict[str, torch.Tensor]:
        """Losses of dense codes, and the features and entries behind them.

        Args:
            codes_Nhw: Dense codes.
            quantised: Restore from entries of the codebook; otherwise from the features themselves, with a ``codebook`` loss of 0.

        Returns:
            ``regression``, ``consistency`` and ``codebook`` are scalars to be added up; ``accuracy`` is the share of codes that are the
            most likely with teacher forcing; ``features`` ``[N, P, D]`` and ``indices`` ``[N, P]``.
        """
        features_NPD = self.compressor(codes_Nhw)
        tokens_NPD, indices_NP, codebook_loss = self.quantizer(features_NPD)
        if not quantised:
            tokens_NPD, codebook_loss = features_NPD, 0.0 * codebook_loss
        codes_NL = codes_Nhw.flatten(1)
        dense_NLD = self.compressor.embedding(codes_NL)
        regressed_NLD, logits_NLV = self.decompressor(tokens_NPD, dense_NLD)
        # not the learned embedding itself: it would shrink, because small targets are easy to regress
        target_NLD = dense_NLD.detach()
        return {
            "regression": (regressed_NLD - target_NLD).square().mean() / target_NLD.var().clamp(min=1e-6),
            "consistency": functional.cross_entropy(logits_NLV.flatten(0, 1), codes_NL.flatten()),
            "codebook": codebook_loss,
            "accuracy": (logits_NLV.argmax(-1) == codes_NL).float().mean().detach(),
            "features": features_NPD.detach(),
            "indices": indices_NP,
        }

    @torch.no_grad()
    def compress(self, codes_Nhw: torch.Tensor) -> torch.Tensor:
        """Dense codes to indices ``[N, P]``, global tokens first."""
        return self.quantizer.nearest(self.compressor(codes_Nhw))

    @torch.no_grad()
    def restore(self, indices_NP: torch.Tensor) -> torch.Tensor:
        """Indices to dense codes ``[N, h, w]``."""
        tokens_NPD = functional.embedding(indices_NP, self.quantizer.entry_KD)
        codes_NL = self.decompressor.generate(tokens_NPD, self.compressor.embedding)
        return codes_NL.view(len(indices_NP), self.settings.height, self.settings.width)
