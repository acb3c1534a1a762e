"""The base of every typed setting, and the kinds of values; the tree of settings is in `megavlm.config.run`.

Numbers have limits, so that nothing is allocated, hashed or waited for that no machine can hold. `true` is no number, 1 is no switch.

Tested by `tests/test_config.py`.
"""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST = 2**31 - 1
"""The largest whole number of any setting but the seed."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers; give a number")
    return value


def _speakable(name: str) -> str:
    if not name.isprintable() or name != name.strip() or name in (".", "..") or set(name) & set("/\\"):
        raise ValueError("names folders and curves; leave out slashes, line breaks, and spaces at its ends")
    return name


def _nameable(path: str) -> str:
    if any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise ValueError("has a part of more than 255 bytes, which no file system takes for a name")
    return path


Whole = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
Positive = Annotated[Whole, Field(gt=0, le=MOST)]
Count = Annotated[Whole, Field(ge=0, le=MOST)]
Seconds = Annotated[Positive, Field(le=10**7)]
Share = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=1e-6, le=1e6)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Switch = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_speakable)]
PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_nameable)]


class Settings(BaseModel):
    """Unknown keys are refused, numbers are finite, nothing changes after validation, the docstring under a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())
