"""Do the two tasks see an image alike? Linear CKA (Kornblith et al., ICML 2019) between the states of the same image's tokens, once as an
image that is read and once as one that is drawn, layer by layer.

Pairing: an image of a generation sample, with its prompt before it, is the drawn one. The read one is the same codes at the beginning of
a sequence, ``<bos> <boi> codes``: attention is causal, so whatever question follows changes nothing there. States are compared at the
same code positions. The mean over images at each position is taken out first: both tasks know where in the image a token stands, and
that alone would look like similarity. Every token is active in every layer.

Letters: N images, P places of an image, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megavlm.data.pack.encode import EncodedSample, Encoder, Span
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.data.read.sample import Coordinates
from megavlm.model.backbone import Backbone
from megavlm.routing.tasks import Task

MAX_POSITIONS = 64
"""Code positions per image that are compared, evenly spread."""


def linear_cka(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Linear centred kernel alignment of N paired states, 0 to 1: ``|YᵀX|² / (|XᵀX| |YᵀY|)`` with Frobenius norms.

    Rotation and scaling of either side do not change it. For independent states it is about D/N, not 0.

    Args:
        x_ND: States.
        y_ND: Their partners; the width may differ.
    """
    x, y = (z.astype(np.float64) - z.mean(0, dtype=np.float64) for z in (x_ND, y_ND))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same numbers from the smaller matrices
        kernel_x, kernel_y = x @ x.T, y @ y.T
        return float((kernel_x * kernel_y).sum() / (np.linalg.norm(kernel_x) * np.linalg.norm(kernel_y)))
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def similarity_by_layer(backbone: Backbone, encoder: Encoder, drawn: Sequence[EncodedSample], costing: Costing, *, device) -> list[float]:
    """CKA after the embedding (1 by construction) and after each layer ``[num_layers + 1]``.

    Args:
        backbone: The backbone, whole in this one process.
        encoder: The encoder with its vocabulary.
        drawn: Generation samples; the first drawn image of each counts, and all of them must have the same grid.
        costing: The costing of any routing plan.
        device: Where the backbone is.
    """
    spans = [next(span for span in sample.spans if span.has_loss) for sample in drawn]
    read = [_as_read(sample, span, encoder) for sample, span in zip(drawn, spans)]
    of_drawn = image_states(backbone, drawn, spans, costing, device=device)
    of_read = image_states(backbone, read, [sample.spans[0] for sample in read], costing, device=device)
    return [linear_cka(_without_position(x), _without_position(y)) for x, y in zip(of_drawn, of_read)]


@torch.no_grad()
def image_states(backbone: Backbone, samples: Sequence[EncodedSample], spans: Sequence[Span], costing: Costing, *, device):
    """The residual stream at the codes of one span per sample, after the embedding and each layer: float32 ``[N, P, D]`` each."""
    model, caught = backbone.causal_lm.model, []

    def catch(_module, _inputs, output):
        h_TD = output if output.ndim == 2 else output[0]
        caught.append(h_TD.index_select(0, rows).float().cpu().numpy())

    hooks = [module.register_forward_hook(catch) for module in (model.embed_tokens, *model.layers)]
    parts = []
    try:
        for sample, span in zip(samples, spans):
            pack = build_pack([sample], costing, num_sources=1, lane=0, step=0, seed=0).with_dense_route().to(device)
            places = np.linspace(0, span.length - 1, min(span.length, MAX_POSITIONS)).round().astype(np.int64)
            rows = torch.from_numpy(span.start + places).to(device)
            caught = []
            backbone.hidden_states(pack)
            parts.append(caught)
    finally:
        for hook in hooks:
            hook.remove()
    return [np.stack(states) for states in zip(*parts)]


def _as_read(sample: EncodedSample, span: Span, encoder: Encoder) -> EncodedSample:
    """``<bos> <boi> codes <eoi> <eos>``. From the tokens: a compressed tokenizer's codes cannot be encoded again."""
    vocabulary = encoder.vocabulary
    tokens = np.array([vocabulary.bos, *sample.tokens[span.start - 1 : span.start + span.length + 1], vocabulary.eos])
    places = np.arange(len(tokens))
    tasks, has_loss = np.where(places == 0, Task.TEXT, Task.UNDERSTANDING), places == len(tokens) - 1
    spans = (Span(2, span.height, span.width, False),)
    return EncodedSample(sample.key, Coordinates(0, 0, 0, 0), tokens, has_loss, tasks, spans, Task.UNDERSTANDING)


def _without_position(states_NPD: np.ndarray) -> np.ndarray:
    return (states_NPD - states_NPD.mean(0)).reshape(-1, states_NPD.shape[2])
