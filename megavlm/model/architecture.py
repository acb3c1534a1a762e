"""The recipe's ``model``: what is wrong with an architecture is said when the recipe is read. Tested by `tests/model/test_families.py`."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from megavlm.costs import num_experts
from megavlm.model.configuration import read_configuration, read_folder
from megavlm.model.families import read_exact
from megavlm.model.fusion import PARTS, Part
from megavlm.model.proof import VOCABULARY, prove
from megavlm.model.sizes import check_numbers
from megavlm.settings import Positive, Settings, Switch


def _checked(architecture: dict[str, Any]) -> dict[str, Any]:
    check_numbers(architecture)
    read_exact(architecture, VOCABULARY)
    prove(architecture)
    return architecture


class ModelConfig(Settings):
    """The backbone: decoder layers of a stock Hugging Face model."""

    architecture: Annotated[
        dict[str, Any],
        BeforeValidator(lambda given: read_folder(given) if isinstance(given, str) else given),
        AfterValidator(_checked),
    ]
    """A `transformers` configuration: `model_type` and its fields, in any style that a published `config.json` has; or the folder of a
    pretrained model, whose `config.json` is then taken over. `vocab_size` and the ids of special tokens are set by the vocabulary. What is
    not computed exactly is refused: see `docs/models.md`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; `auto` is bfloat16 on CUDA and float32 on CPU."""
    activation_checkpointing: Switch | Positive = False
    """Recompute layers in the backward pass instead of storing their activations: `true` is every layer, a number n is every n-th."""
    compiled: Literal["auto"] | list[Part] = "auto"
    """Small functions that training compiles, of `norm`, `rotary`, `mlp` and `loss`: one kernel each instead of several, the same numbers
    up to rounding. `auto` is all of them on CUDA and none on CPU."""

    def is_bfloat16(self, device_type: str) -> bool:
        """Whether the forward and backward pass of the training run in bfloat16 on such a device."""
        return self.dtype == "bfloat16" or (self.dtype == "auto" and device_type == "cuda")

    def compiled_on(self, device_type: str) -> Collection[Part]:
        """The functions that are compiled for training on such a device."""
        if self.compiled == "auto":
            return PARTS if device_type == "cuda" else ()
        return self.compiled

    @property
    def has_experts(self) -> bool:
        """Whether a token passes some of several MLPs in each layer."""
        return num_experts(read_configuration(self.architecture, VOCABULARY)) > 0
