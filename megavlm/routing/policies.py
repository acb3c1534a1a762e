"""Routing policies: for every layer of the backbone, what share of an image span's tokens is active.

A policy is a `Settings` class with a ``policy`` name and a method ``layers``. Two layers with the same ``draw`` rank the tokens
of a span alike, so that a lower share keeps a subset of a higher one; another draw is another ranking. A token that is
inactive in a layer stays in the residual stream as it was: whether it is *dropped* (never active again) or *bypasses*
(active again later) is only a matter of the later layers' shares.
"""

from typing import Annotated, Literal, NamedTuple, Union

from pydantic import Field

from megavlm.errors import ConfigError
from megavlm.routing.selectors import SELECTORS
from megavlm.settings import Settings

KeepRatio = Annotated[float, Field(gt=0, le=1)]


class LayerPlan(NamedTuple):
    """What one layer does with the image spans of one task."""

    keep_ratio: float = 1.0
    """Share of every span's tokens that is active, rounded up to whole tokens."""
    draw: int = 0
    """Which ranking of the span's tokens decides."""


class Policy(Settings):
    """Base of all policies."""

    policy: str
    """Name of the policy."""
    selector: Literal[tuple(SELECTORS)] = "random"
    """Which tokens of a span stay."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        """The plan of each of ``num_layers`` layers."""
        raise NotImplementedError


class Dense(Policy):
    """Every token in every layer."""

    policy: Literal["dense"] = "dense"

    def layers(self, num_layers: int) -> list[LayerPlan]:
        return [LayerPlan()] * num_layers


class LateDrop(Policy):
    """All image tokens leave after a layer, because understanding hardly attends to them in late layers
    (arXiv 2606.01503, layerwise attention analysis; FastV, arXiv 2403.06764)."""

    policy: Literal["late_drop"]
    after_layer: Annotated[int, Field(ge=1)]
    """Number of layers that see the image."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_layer("late_drop.after_layer", self.after_layer, num_layers - 1)
        return [LayerPlan()] * self.after_layer + [LayerPlan(0.0)] * (num_layers - self.after_layer)


class RandomLTD(Policy):
    """Random layerwise token dropping: every layer but the first and the last runs on a random subset of its own, the
    rest bypasses it (arXiv 2211.11586)."""

    policy: Literal["random_ltd"]
    keep_ratio: KeepRatio
    """Share of the tokens in the middle layers."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        if num_layers < 3:
            raise ConfigError(
                f"routing: random_ltd needs at least 3 layers, the model has {num_layers}\n  do:    use a deeper model"
            )
        return [LayerPlan(), *(LayerPlan(self.keep_ratio, layer) for layer in range(1, num_layers - 1)), LayerPlan()]


POLICIES = (Dense, LateDrop, RandomLTD)
AnyPolicy = Annotated[Union[POLICIES], Field(discriminator="policy")]


def check_layer(setting: str, layer: int, highest: int) -> None:
    """Raise a ConfigError if a policy names a layer that the model does not have."""
    if layer > highest:
        raise ConfigError(f"routing: {setting} is {layer}, but this model allows at most {highest}\n  do:    lower it")
