"""From the resolved configuration to the parts of a run, each made once per process. Tested by `tests/parts/test_resolve.py`."""

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from megavlm.config import RunConfig
from megavlm.costs import ModelShape
from megavlm.data.pack.config import Mixture
from megavlm.data.pack.encode import Encoder
from megavlm.data.pack.lane import Lane
from megavlm.data.pack.mixture import estimate_mixture
from megavlm.data.pack.pack import Costing
from megavlm.data.pack.sources import Source, State, make_sources
from megavlm.data.read.urls import Opener
from megavlm.data.tools.simulate import Situation
from megavlm.engine.schedule import LearningRates
from megavlm.errors import ConfigError
from megavlm.image_tokenizers.build import ImageTokenizer, build_image_tokenizer
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.configuration import read_configuration
from megavlm.model.fusion import Part
from megavlm.routing.config import DENSE
from megavlm.routing.phases import Phases
from megavlm.vocabulary import Vocabulary


class Parts:
    """What a configuration describes. Every part is made when it is first asked for, and kept.

    Travels to loader workers as the configuration alone: there the parts are made again, once per worker.

    Args:
        config: The recipe; `make_lane` needs it resolved, with ``data.mixture``.
        device: Where the image tokenizer runs.
        image_tokenizer: The configuration's, if there is one already.
    """

    def __init__(self, config: RunConfig, device: str | torch.device = "cpu", image_tokenizer: ImageTokenizer | None = None):
        self.config = config
        self.device = torch.device(device)
        if image_tokenizer is not None:
            self.image_tokenizer = image_tokenizer

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """Its weights, if it has any, are read when they are needed."""
        return build_image_tokenizer(self.config.vocabulary.image_tokenizer, self.device)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        config = self.config.vocabulary
        return Vocabulary(config.text_model, self.image_tokenizer.codebook_size, config.trained_ids)

    @cached_property
    def encoder(self) -> Encoder:
        """Encoder of prompts and held-out samples: no prompt is replaced."""
        return self._encoder(0.0)

    @cached_property
    def training_encoder(self) -> Encoder:
        """Encoder of the training samples: some prompts become ``<unconditional>``."""
        return self._encoder(self.config.data.unconditional_ratio)

    @cached_property
    def sources(self) -> list[Source]:
        return make_sources(self.config.data.sources)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's sizes, without making its weights."""
        return ModelShape.of(self.model_configuration)

    @cached_property
    def model_configuration(self) -> PreTrainedConfig:
        """Configuration of `transformers`, with the run's own vocabulary."""
        return read_configuration(self.config.model.architecture, self.vocabulary.size)

    @cached_property
    def phases(self) -> Phases:
        """The policies over the run; needs nothing that lies on the disk."""
        configuration = read_configuration(self.config.model.architecture, 1)
        shape = ModelShape.of(configuration)
        phases = Phases(self.config.routing.phases_in(self.config.optimizer.num_steps), shape.num_layers)
        phases.check_model(shape.head_width, configuration.model_type)
        return phases

    @cached_property
    def learning_rates(self) -> LearningRates:
        """The learning rate of every step."""
        optimizer = self.config.optimizer
        return LearningRates(optimizer, self.config.routing.phases_in(optimizer.num_steps))

    @cached_property
    def costing(self) -> Costing:
        """Costing of training packs."""
        if self.phases.has_patches:
            check_patches(self.phases, self.image_tokenizer)
        return Costing(self.phases, self.shape)

    @cached_property
    def inference_costing(self) -> Costing:
        """Costing of the route that ``evaluation.route`` names: dense, or the run's policies in full."""
        return self._costing_of(self.config.evaluation.route)

    @cached_property
    def guidance_costing(self) -> Costing | None:
        """Costing of the route of guidance's unconditional half, if it has one of its own."""
        evaluation = self.config.evaluation
        route = evaluation.guidance_route
        return None if route is None or route == evaluation.route else self._costing_of(route)

    def _costing_of(self, route: str) -> Costing:
        phases = Phases.always(*(DENSE if route == "dense" else self.config.routing.trained), self.shape.num_layers)
        if phases.has_patches:
            raise ConfigError(
                "evaluation: the policy patches is a way to train, and no route to judge or draw along\n"
                "  do:    leave evaluation.route and evaluation.guidance_route at dense"
            )
        return Costing(phases, self.shape)

    @property
    def balance_weights(self) -> list[float]:
        """Factor of the loss that balances experts; none for a dense model."""
        given = self.config.loss.balance_weight
        return [self.model_configuration.router_aux_loss_coef if given is None else given] if self.shape.num_experts else []

    @property
    def mixture(self) -> Mixture:
        """The mixture of a resolved configuration."""
        if self.config.data.mixture is None:
            raise TypeError("the configuration is not resolved: call with_mixture")
        return self.config.data.mixture

    def make_lane(self, number: int, state: State | None = None) -> Lane:
        """One of the run's lanes, at its beginning or where ``state`` left it."""
        config = self.config
        return Lane(
            number,
            self.sources,
            self.training_encoder,
            self.costing,
            mixture=self.mixture,
            config=config.data,
            seed=config.seed,
            state=state,
        )

    def make_causal_lm(self) -> PreTrainedModel:
        """The stock model with random weights from torch's global generator."""
        return make_causal_lm(self.config.model.architecture, self.vocabulary.size)

    def make_backbone(self, causal_lm: PreTrainedModel | None = None, compiled: Collection[Part] = ()) -> Backbone:
        """The backbone around a stock model, by default one with random weights.

        Args:
            causal_lm: The model.
            compiled: Small functions that are compiled: for training, ``model.compiled_on``.
        """
        config = self.config
        return Backbone(
            causal_lm or self.make_causal_lm(),
            self.phases,
            num_sources=len(config.data.sources),
            max_labels=config.data.pack_tokens,
            chunk_rows=config.loss.chunk_rows,
            activation_checkpointing=config.model.activation_checkpointing,
            feature_width=self.image_tokenizer.feature_width,
            compiled=compiled,
        )

    def with_mixture(self) -> "Parts":
        """The same with ``data.mixture`` filled in, if it is not yet, or is that of other sources; reads samples."""
        data = self.config.data
        if data.mixture is not None and list(data.mixture) == list(data.sources):
            return self
        open_url = Opener(data.retries, data.cache_dir, data.cache_gib)
        mixture = estimate_mixture(self.sources, self.training_encoder, data, open_url)
        return self.replaced(data=data.model_copy(update={"mixture": mixture}))

    def replaced(self, **settings: Any) -> "Parts":
        """The parts of the same configuration with other blocks of settings than ``vocabulary``; the image tokenizer is kept."""
        return Parts(self.config.model_copy(update=settings), self.device, self.image_tokenizer)

    def _encoder(self, unconditional_ratio: float) -> Encoder:
        return Encoder(self.vocabulary, self.image_tokenizer, unconditional_ratio, self.config.seed)

    def __getstate__(self) -> dict[str, Any]:
        # a SentencePiece model does not travel; workers tokenize on the CPU
        return {"config": self.config, "device": torch.device("cpu")}


def check_patches(phases: Phases, tokenizer: ImageTokenizer) -> None:
    """Refuse blocks of codes that no image consists of.

    Raises:
        ConfigError: If images are read as features, or a size does not divide the grid of codes.
    """
    for phase in phases.phases:
        for task, policy in zip(("understanding", "generation"), phase.policies):
            size = policy.patch_size
            if size > 1 and task == "understanding" and tokenizer.feature_width:
                raise ConfigError(
                    f"{phase.place}.understanding: patches are means of codes, and this image tokenizer has images read as features\n"
                    "  do:    choose another policy"
                )
            if tokenizer.height % size or tokenizer.width % size:
                raise ConfigError(
                    f"{phase.place}.{task}: patches of {size} x {size} cannot fill images of {tokenizer.height} x {tokenizer.width} codes\n"
                    "  do:    choose a size that divides both"
                )


def situation_of(config: RunConfig) -> Situation:
    """What `megavlm data simulate` needs of a recipe: its mixture, route and model."""
    parts = Parts(config).with_mixture()
    return Situation(parts.mixture, parts.costing, parts.config.data, parts.config.seed, parts.phases.typical_step)
