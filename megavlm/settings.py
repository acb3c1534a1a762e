"""The base of every typed setting; the tree of them is in `megavlm.config`."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Unknown keys are refused, nothing changes after validation, the docstring under a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
