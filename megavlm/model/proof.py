"""A small copy of an architecture, run packed through the backbone and one by one through `transformers`: both must say the same.

Letters: L tokens of a sample. Tested by `tests/model/test_families.py`.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from megavlm.costs import ModelShape, num_experts
from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.data.read.sample import Coordinates
from megavlm.errors import ConfigError
from megavlm.model.backbone import Backbone
from megavlm.model.configuration import without_special_rows
from megavlm.model.ends import final_norm, logits_of
from megavlm.model.families import read_exact
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense
from megavlm.routing.tasks import Task

TOLERANCE = 1e-4
LENGTHS = (13, 7)
"""Tokens of the two samples of the pack."""
WINDOW = 5
"""Tokens that the small copy's sliding windows see at most."""
VOCABULARY = 64
NOT_COPIED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Fields with a value for each layer."""


def prove(architecture: dict[str, Any]) -> float:
    """Compare, once per architecture and process; takes a fraction of a second and touches no random generator.

    Returns:
        The largest difference of two logits.

    Raises:
        ValueError: If a layer's cost or the logits differ, or `transformers` itself cannot run it.
    """
    return _prove(json.dumps(architecture))


@lru_cache(maxsize=64)
def _prove(architecture: str) -> float:
    config = small_copy(read_exact(json.loads(architecture), VOCABULARY))
    family = config.model_type
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            causal_lm = random_model(config)
            expected_TV = logits_one_by_one(causal_lm)
        except Exception as error:  # whatever modules make of fields that do not fit each other
            raise ValueError(f"transformers cannot run this {family}: {type(error).__name__}: {error}") from error
        if not expected_TV.isfinite().all():
            raise ValueError(f"transformers gives no finite numbers with these fields of {family}; correct them")
        try:
            logits_TV, windows = packed_logits(causal_lm)
            difference = float((logits_TV - expected_TV).abs().max())
        except ConfigError as error:
            raise ValueError(f"this {family} is not computed exactly here: {error}") from error
    if not difference <= TOLERANCE:
        raise ValueError(
            f"this {family} is not computed exactly here: logits of packed samples differ by {difference:.1e} from those of transformers;"
            " choose another family, or leave out what sets this one apart"
        )
    flops = ModelShape.of(config).layer_flops_per_token
    for layer in causal_lm.model.layers:
        if 2 * (weights := active_weights(layer, config)) != flops:
            raise ValueError(f"the cost of a layer of this {family} is not known: {2 * weights:g} FLOPs per token, counted as {flops}")
    if any(windows) and windows != (counted := ModelShape.of(config).windows):
        raise ValueError(f"the cost of attention of this {family} is not known: its windows are {windows}, counted as {counted}")
    return difference


def active_weights(layer: nn.Module, config: PreTrainedConfig) -> float:
    """Numbers that a token is multiplied by in a layer: all of its matrices, and of stacked experts those that take the token.

    Norms of single heads may have weights of two dimensions too: they are no matrices.
    """
    share = ModelShape.of(config).active_experts / max(1, num_experts(config))
    matrices = [p for name, p in layer.named_parameters() if p.dim() > 1 and "norm" not in name]
    return sum(p.numel() * (share if p.dim() == 3 else 1) for p in matrices)


def small_copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture with few narrow layers: one of each kind, heads as wide and as many to a group, up to two."""
    groups = min(2, config.num_attention_heads // config.num_key_value_heads)
    heads = 2 * groups
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_square = config.hidden_size == config.num_attention_heads * head_width
    layers = _layers_of_each_kind(config)
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "hidden_size": heads * head_width if is_square else 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(layers),
    }
    if getattr(config, "head_dim", None):
        changes["head_dim"] = head_width
    if num_experts(config):
        name = "num_experts" if "num_experts" in config.to_dict() else "num_local_experts"
        changes |= {name: min(num_experts(config), 2 + config.num_experts_per_tok), "moe_intermediate_size": 48}
    if ModelShape.of(config).windows:
        changes["sliding_window"] = min(config.sliding_window, WINDOW)
    for name in LAYER_LISTS:
        if getattr(config, name, None):
            changes[name] = [getattr(config, name)[layer] for layer in layers]
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_COPIED}
    return without_special_rows(type(config).from_dict(fields | changes))


def _layers_of_each_kind(config: PreTrainedConfig) -> list[int]:
    kinds = {}
    for layer in range(config.num_hidden_layers):
        lists = [getattr(config, name, None) for name in LAYER_LISTS]
        kinds.setdefault(tuple(values[layer] for values in lists if values), layer)
    return sorted({*kinds.values(), *range(min(2, config.num_hidden_layers))})


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """In float64, every parameter random, norms and biases too: none may be without effect."""
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in causal_lm.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2, generator=generator)
    return causal_lm


def logits_one_by_one(causal_lm: PreTrainedModel) -> torch.Tensor:
    """``[T, V]`` of the samples, by `transformers` alone."""
    causal_lm.config._attn_implementation = "eager"
    causal_lm.config._experts_implementation = "eager"
    samples = [torch.from_numpy(sample.tokens)[None] for sample in _samples()]
    return torch.cat([causal_lm(input_ids=ids_1L, use_cache=False, return_dict=True).logits[0] for ids_1L in samples])


def packed_logits(causal_lm: PreTrainedModel) -> tuple[torch.Tensor, tuple[int | None, ...]]:
    """``[T, V]`` of the samples as one pack, as in training; and the sliding windows that the layers asked for."""
    config, windows = causal_lm.config, {}
    phases = Phases.always(Dense(), Dense(), config.num_hidden_layers)
    backbone = Backbone(causal_lm, phases, num_sources=1, max_labels=sum(LENGTHS), chunk_rows=sum(LENGTHS))

    def watch(layer, _active, _q, _k, _v, scoring, _context):
        windows[layer] = scoring.window

    h_TD, _ = backbone.hidden_states(_pack(Costing(phases, ModelShape.of(config))), watch)
    return logits_of(causal_lm, final_norm(causal_lm, h_TD)), tuple(windows.values())


def _pack(costing: Costing) -> Pack:
    return build_pack(_samples(), costing, num_sources=1, lane=0, step=0, seed=0)


def _samples() -> list[EncodedSample]:
    rng = np.random.default_rng(0)
    return [
        EncodedSample(
            key=str(i),
            coordinates=Coordinates(0, 0, 0, i),
            tokens=rng.integers(0, VOCABULARY, length),
            has_loss=np.arange(length) > 0,
            tasks=np.full(length, Task.TEXT),
            spans=(),
            task=Task.TEXT,
        )
        for i, length in enumerate(LENGTHS)
    ]
