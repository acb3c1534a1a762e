"""Routing policies: for every layer of the backbone, what share of an image span's tokens is active, and how it came about.

A policy is a `Settings` class with a ``policy`` name and a method ``layers``; `register_policy` makes it known to recipes. A token that
is inactive in a layer stays in the residual stream as it was: whether it is *dropped* (never active again) or *bypasses* (active
again later) is only a matter of the later layers' shares.

Tested by `tests/routing/test_route.py`.
"""

from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

from pydantic import AfterValidator, Field, GetCoreSchemaHandler

from megavlm.errors import ConfigError
from megavlm.routing.selectors import check_selector
from megavlm.settings import MOST, Count, Number, Positive, Settings, Whole

KeepRatio = Annotated[Number, Field(gt=0, le=1)]
Selector = Annotated[str, AfterValidator(check_selector)]


class LayerPlan(NamedTuple):
    """What one layer does with the image spans of one task."""

    keep_ratio: float = 1.0
    """Share of every span's tokens that is active, rounded up to whole tokens."""
    draw: int = 0
    """Which ranking of the span's tokens decides. Layers with the same draw rank alike, so that a lower share keeps a subset."""
    nested: bool = False
    """Rank only tokens that were active in the layer before."""
    how: Literal["select", "gate", "merge", "inject", "skip_mlp", "show"] = "select"
    """What decides or becomes of the others: a selector leaves them out; a learned gate does; they merge into the kept ones; they give only
    keys and values, through projections of their own; they attend but skip the MLP; they only show their keys and values, by the layer's
    own projections."""

    @property
    def ranks(self) -> bool:
        """Whether a selector ranks the tokens."""
        return self.how in ("select", *PARTIAL)


PARTIAL = ("skip_mlp", "show")
"""Kinds of plans under which all tokens are active, and those that are not kept go through parts of the layer."""
DENSE = LayerPlan()
P = TypeVar("P", bound="type[Policy]")
POLICIES: dict[str, type["Policy"]] = {}
"""Every policy that a recipe can name."""


def register_policy(policy: P) -> P:
    """Class decorator: make a policy known to recipes under the default of its field ``policy``."""
    POLICIES[policy.model_fields["policy"].default] = policy
    return policy


class Policy(Settings):
    """Base of all policies."""

    policy: str
    """Name of the policy."""

    @property
    def selector_name(self) -> str:
        """Which tokens of a span stay; policies that leave the choice to the user have a field ``selector``."""
        return getattr(self, "selector", "random")

    @property
    def patch_size(self) -> int:
        """Codes along each side of a block that is one token in training; 1 leaves every code a token."""
        return 1

    def layers(self, num_layers: int) -> list[LayerPlan]:
        """The plan of each of ``num_layers`` layers."""
        raise NotImplementedError


class AnyPolicy:
    """Annotation of a setting that holds a policy: whichever class is registered under its name."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, handler: GetCoreSchemaHandler):
        # of as many classes as are registered, which the | of types cannot say
        return handler(Annotated[Union[tuple(POLICIES.values())], Field(discriminator="policy")])  # noqa: UP007


@register_policy
class Dense(Policy):
    """Every token in every layer."""

    policy: Literal["dense"] = "dense"

    def layers(self, num_layers: int) -> list[LayerPlan]:
        return [DENSE] * num_layers


@register_policy
class LateDrop(Policy):
    """All image tokens leave after a layer, because understanding hardly attends to them in late layers
    (arXiv 2606.01503, layerwise attention analysis; FastV, arXiv 2403.06764)."""

    policy: Literal["late_drop"] = "late_drop"
    after_layer: Positive
    """Number of layers that see the image."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_layers("late_drop.after_layer", self.after_layer, num_layers - 1)
        return [DENSE] * self.after_layer + [LayerPlan(0.0)] * (num_layers - self.after_layer)


@register_policy
class LateEntry(Policy):
    """Image tokens join at a layer: shallow layers hardly use them (HiDrop, arXiv 2602.23699)."""

    policy: Literal["late_entry"] = "late_entry"
    at_layer: Positive
    """First layer that sees the image."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_layers("late_entry.at_layer", self.at_layer, num_layers - 1)
        return [LayerPlan(0.0)] * self.at_layer + [DENSE] * (num_layers - self.at_layer)


@register_policy
class Pyramid(Policy):
    """Fewer and fewer image tokens: each of some equal parts of the layers keeps a share of the part before, ranked anew
    (PyramidDrop, arXiv 2410.17247: a half, in four parts, by the attention of the instruction)."""

    policy: Literal["pyramid"] = "pyramid"
    keep_ratio: KeepRatio = 0.5
    """Share of the tokens of one part that goes on to the next."""
    num_parts: Annotated[Positive, Field(ge=2)] = 4
    """Parts of equally many layers; the first is dense."""
    selector: Selector = "random"
    """Which tokens go on."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_layers("pyramid.num_parts", self.num_parts, num_layers)
        parts = [layer * self.num_parts // num_layers for layer in range(num_layers)]
        return [LayerPlan(self.keep_ratio**part, part, nested=True) if part else DENSE for part in parts]


@register_policy
class RandomLTD(Policy):
    """Random layerwise token dropping: every layer but the first and the last runs on a subset of its own, the rest
    bypasses it (arXiv 2211.11586)."""

    policy: Literal["random_ltd"] = "random_ltd"
    keep_ratio: KeepRatio
    """Share of the tokens in the middle layers."""
    selector: Selector = "random"
    """Which tokens stay; the paper's are random."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_depth("random_ltd", num_layers)
        return [DENSE, *(LayerPlan(self.keep_ratio, layer) for layer in range(1, num_layers - 1)), DENSE]


class Block(Policy):
    """Something happens in a block of layers; the others are dense."""

    keep_ratio: KeepRatio = 0.5
    """Share of the tokens inside the block."""
    first_layer: Count
    """First layer of the block."""
    end_layer: Annotated[Whole, Field(ge=-MOST, le=MOST)]
    """First layer after the block; negative counts from the end, so that -1 leaves one dense layer."""
    selector: Selector = "random"
    """Which tokens stay."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        end = self.end_layer
        if end < 0:
            end += num_layers
        check_layers(f"{self.policy}.end_layer", end, num_layers)
        check_layers(f"{self.policy}.first_layer", self.first_layer, end - 1)
        return [self._inside(layer) if self.first_layer <= layer < end else DENSE for layer in range(num_layers)]

    def _inside(self, layer: int) -> LayerPlan:
        """The plan of a layer of the block."""
        raise NotImplementedError


class Bypass(Block):
    """One subset runs through a block of layers, the rest bypasses the block."""

    def _inside(self, layer: int) -> LayerPlan:
        return LayerPlan(self.keep_ratio, draw=1)


@register_policy
class Tread(Bypass):
    """One long bypass for half of the tokens, in training only (TREAD, arXiv 2501.04765: layers 2 to 8 of 12)."""

    policy: Literal["tread"] = "tread"
    first_layer: Count = 2
    """First layer of the block."""
    end_layer: Annotated[Whole, Field(ge=-MOST, le=MOST)] = -4
    """First layer after the block; negative counts from the end."""


@register_policy
class SharedBypass(Bypass):
    """The same bypass for both tasks: one set of weights, one block of layers, dense first and last layers, a share for each task.

    Ours, against the divergent pathways that task-specific accelerators need (arXiv 2606.01503): every token of either task goes
    through the same projections of the same layers, or through none. Set it for both tasks, with the same block.
    """

    policy: Literal["shared_bypass"] = "shared_bypass"
    first_layer: Positive = 1
    """First layer of the block, the same for both tasks."""
    end_layer: Annotated[Whole, Field(ge=-MOST, le=MOST)] = -1
    """First layer after the block, the same for both tasks; negative counts from the end."""


@register_policy
class VisibleBypass(SharedBypass):
    """A shared bypass in which nobody is blind: tokens that skip the block still give keys and values to each of its layers, through
    the layer's own norm and projections.

    Ours. Inside a plain bypass a token sees only those that were kept, and at inference suddenly all. Here it sees all of them, as they
    were when the block began; the keys and values cost 1.6% of a layer of a 7B model with grouped queries. The state of a skipped token
    goes on as it was: the fusion of both states that SPRINT (arXiv 2510.21986) learns would need weights that a stock model lacks.
    """

    policy: Literal["visible_bypass"] = "visible_bypass"
    first_layer: Count = 1
    """First layer of the block, the same for both tasks; 0 is the model's first."""
    selector: Selector = "stratified"
    """Which tokens stay."""

    def _inside(self, layer: int) -> LayerPlan:
        return LayerPlan(self.keep_ratio, draw=1, how="show")


@register_policy
class SparseMLP(Block):
    """All image tokens attend, a share of them skips the MLP; every layer draws anew (after Skip-Vision, arXiv 2503.17817, whose
    redundant tokens skip it everywhere). The MLP is 87% of a 7B layer's FLOPs. No layer needs to be dense: every token is in each.
    """

    policy: Literal["sparse_mlp"] = "sparse_mlp"
    keep_ratio: KeepRatio = 0.5
    """Share of the tokens that go through the MLP."""
    first_layer: Count = 1
    """First layer of the block; 0 is the model's first."""
    end_layer: Annotated[Whole, Field(ge=-MOST, le=MOST)] = -1
    """First layer after the block; negative counts from the end, and the number of layers leaves none dense."""

    def _inside(self, layer: int) -> LayerPlan:
        return LayerPlan(self.keep_ratio, draw=layer, how="skip_mlp")


@register_policy
class MixtureOfDepths(Policy):
    """In every other layer, a learned gate decides which tokens go through; its value scales what the layer adds
    (arXiv 2404.02258, whose top-k sees the future).

    Ours is causal and keeps an exact number: a token goes through if its gate is open and the span's quota is not used up, or if all
    that are left are needed to fill it. An auxiliary loss teaches the gates to open for the top-k, as in the paper. Works on spans
    that the model draws, in training and when sampling. With ``keep_ratio`` 1 the gates still scale what a layer adds, so this is not dense
    training.
    """

    policy: Literal["mixture_of_depths"] = "mixture_of_depths"
    keep_ratio: KeepRatio = 0.5
    """Share of the tokens that go through a gated layer."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_depth("mixture_of_depths", num_layers)
        gated = range(1, num_layers - 1, 2)
        return [LayerPlan(self.keep_ratio, layer, how="gate") if layer in gated else DENSE for layer in range(num_layers)]


@register_policy
class KVInjection(Policy):
    """A control arm of the limits study (arXiv 2606.01503), with parameters of its own: it exists to reproduce the loss of synergy.

    For understanding (HiMix, arXiv 2501.10318): image tokens never travel; each layer gives their keys and values through a norm and
    projections of its own from their embeddings, without rotary embedding. For generation its mirror (HMGen as we understand
    it): the prompt's tokens never travel but give keys and values likewise. The same modality then meets different weights in the two
    tasks, which is what the study blames. It is never dense training: no schedule turns the projections off.
    """

    policy: Literal["kv_injection"] = "kv_injection"

    def layers(self, num_layers: int) -> list[LayerPlan]:
        return [LayerPlan(0.0, how="inject")] * num_layers


@register_policy
class Merge(Policy):
    """At a layer, the most similar image tokens merge into others: size-weighted means, and attention that counts a token as often
    as it stands for (ToMe, arXiv 2210.09461)."""

    policy: Literal["merge"] = "merge"
    at_layer: Positive
    """Layers before the merge."""
    keep_ratio: Annotated[Number, Field(ge=0.5, le=1)] = 0.5
    """Share of the tokens that is left; at most every second one can merge."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        check_layers("merge.at_layer", self.at_layer, num_layers - 1)
        merged = LayerPlan(self.keep_ratio, draw=1, nested=True, how="merge")
        return [DENSE] * self.at_layer + [merged] * (num_layers - self.at_layer)


@register_policy
class Patches(Policy):
    """Blocks of codes are single tokens for a part of the training, then every code is one again, in a model that is dense throughout.

    A token is the mean of its codes' embeddings, and predicts all codes of the next block with one softmax: fewer tokens, no weights of
    its own, nothing skipped (next patch prediction, arXiv 2412.15321; patch-level training, arXiv 2407.12665). A way to train only: set a
    phase after it, or a dense finish. It has no warm-up: a block is one token or it is not.
    """

    policy: Literal["patches"] = "patches"
    size: Annotated[Positive, Field(ge=2, le=16)] = 2
    """Codes along each side of a block; must divide the rows and columns of the images."""

    @property
    def patch_size(self) -> int:
        return self.size

    def layers(self, num_layers: int) -> list[LayerPlan]:
        return [DENSE] * num_layers


def check_layers(setting: str, layer: int, highest: int) -> None:
    """Raise a ConfigError if a policy names a layer that the model does not have."""
    if layer > highest:
        raise ConfigError(f"routing: {setting} is {layer}, but this model allows at most {highest}\n  do:    lower it")


def check_depth(policy: str, num_layers: int) -> None:
    """Raise a ConfigError if there is no layer between the first and the last."""
    if num_layers < 3:
        raise ConfigError(f"routing: {policy} needs at least 3 layers, the model has {num_layers}\n  do:    use a deeper model")
