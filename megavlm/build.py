"""From the resolved configuration to the parts: each function makes one of them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from megavlm.config import RunConfig
from megavlm.costs import ModelShape
from megavlm.data.encode import Encoder
from megavlm.data.lane import Lane
from megavlm.data.mixture import estimate_mixture
from megavlm.data.pack import Costing
from megavlm.data.simulate import Situation
from megavlm.data.sources import State, make_sources
from megavlm.data.urls import Opener
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.compressed_tokenizer import CompressedTokenizer, read_settings
from megavlm.model.image_tokenizer import ImageTokenizer, PixelTokenizer
from megavlm.model.vq_tokenizer import VQTokenizer
from megavlm.routing.policies import Dense
from megavlm.routing.route import RoutingPlan, Schedule
from megavlm.vocabulary import Vocabulary


def build_image_tokenizer(config: RunConfig, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer; its weights, if it has any, are read when they are needed."""
    return _image_tokenizer(config.vocabulary.image_tokenizer, device)


def _image_tokenizer(settings, device: str | torch.device) -> ImageTokenizer:
    if settings.kind == "pixel":
        return PixelTokenizer(settings.levels, settings.height, settings.width)
    if settings.kind == "compressed":
        around = _image_tokenizer(settings.around, device)
        return CompressedTokenizer(settings.path, around, device, settings.fingerprint)
    return VQTokenizer(settings.path, settings.height, settings.width, device, settings.fingerprint)


def with_fingerprint(config: RunConfig) -> RunConfig:
    """The configuration with the fingerprint of its image tokenizer's weights, where it has any; reads them."""
    settings = config.vocabulary.image_tokenizer
    if settings.kind == "pixel":
        return config
    fingerprint = build_image_tokenizer(config).fingerprint
    vocabulary = config.vocabulary.model_copy(
        update={"image_tokenizer": settings.model_copy(update={"fingerprint": fingerprint})}
    )
    return config.model_copy(update={"vocabulary": vocabulary})


def feature_width(config: RunConfig) -> int:
    """Numbers per token of what the model reads of images; 0 if it reads codes."""
    settings = config.vocabulary.image_tokenizer
    is_continuous = settings.kind == "compressed" and settings.understanding == "continuous"
    return read_settings(Path(settings.path)).embedding_width if is_continuous else 0


def build_vocabulary(config: RunConfig) -> Vocabulary:
    return Vocabulary(config.vocabulary.text_model, build_image_tokenizer(config).codebook_size)


def build_encoder(config: RunConfig, unconditional_ratio: float, device: str | torch.device = "cpu") -> Encoder:
    tokenizer = build_image_tokenizer(config, device)
    return Encoder(build_vocabulary(config), tokenizer, unconditional_ratio, config.seed, bool(feature_width(config)))


def build_causal_lm(config: RunConfig, vocabulary: Vocabulary):
    """The stock model with random weights from torch's global generator."""
    return make_causal_lm(config.model.architecture, vocabulary.size)


def build_backbone(config: RunConfig, causal_lm) -> Backbone:
    return Backbone(
        causal_lm,
        build_routing_plan(config, causal_lm.config.num_hidden_layers),
        num_sources=len(config.data.sources),
        max_labels=config.data.pack_tokens,
        chunk_rows=config.loss.chunk_rows,
        activation_checkpointing=config.model.activation_checkpointing,
        feature_width=feature_width(config),
    )


def build_routing_plan(config: RunConfig, num_layers: int) -> RoutingPlan:
    routing = config.routing
    schedule = Schedule(config.optimizer.num_steps, routing.warmup_fraction, routing.dense_finish_fraction)
    return RoutingPlan(routing.understanding, routing.generation, num_layers, schedule)


def inference_costing(config: RunConfig, causal_lm_config) -> Costing:
    """Of the route that ``evaluation.route`` asks for: dense, or the run's policies in full."""
    routing, num_layers = config.routing, causal_lm_config.num_hidden_layers
    always = Schedule(1, 0.0, 0.0)
    policies = (Dense(), Dense()) if config.evaluation.route == "dense" else (routing.understanding, routing.generation)
    return Costing(RoutingPlan(*policies, num_layers, always), ModelShape.of(causal_lm_config))


def model_shape(config: RunConfig, vocabulary: Vocabulary) -> ModelShape:
    """The model's sizes, without making its weights."""
    return ModelShape.of(AutoConfig.for_model(**config.model.architecture, vocab_size=vocabulary.size))


def with_mixture(config: RunConfig) -> RunConfig:
    """The configuration with ``data.mixture`` filled in, if it is not yet, or is that of other sources."""
    data = config.data
    if data.mixture is not None and list(data.mixture) == list(data.sources):
        return config
    encoder = build_encoder(config, data.unconditional_ratio)
    open_url = Opener(data.retries, data.cache_dir, data.cache_gib)
    sources = make_sources(data.sources)
    mixture = estimate_mixture(sources, encoder, data.mixture_samples, data.pack_tokens, data.over_long, open_url)
    return config.model_copy(update={"data": data.model_copy(update={"mixture": mixture})})


def situation_of(config: RunConfig) -> Situation:
    """What `megavlm data simulate` needs of a recipe: its mixture, route and model."""
    config = with_mixture(config)
    shape = model_shape(config, build_vocabulary(config))
    costing = Costing(build_routing_plan(config, shape.num_layers), shape)
    routing = config.routing
    # between warm-up and dense finish, where the route is in full
    middle = (1 + routing.warmup_fraction - routing.dense_finish_fraction) / 2
    return Situation(config.data.mixture, costing, config.data, config.seed, int(config.optimizer.num_steps * middle))


@dataclass
class LaneFactory:
    """Makes the lanes of a run in any process: ``LaneFactory(config)(number, state)``.

    Args:
        config: Resolved, with ``data.mixture``.
    """

    config: RunConfig

    def __call__(self, number: int, state: State | None = None) -> Lane:
        sources, encoder, costing = self._parts
        data = self.config.data
        return Lane(number, sources, encoder, costing, data.mixture, data, self.config.seed, state)

    @cached_property
    def _parts(self) -> tuple[list, Encoder, Costing]:
        encoder = build_encoder(self.config, self.config.data.unconditional_ratio)
        shape = model_shape(self.config, encoder.vocabulary)
        costing = Costing(build_routing_plan(self.config, shape.num_layers), shape)
        return make_sources(self.config.data.sources), encoder, costing

    def __getstate__(self) -> dict[str, Any]:
        # the parts are made again where they are needed: a SentencePiece model does not travel
        return {"config": self.config}
