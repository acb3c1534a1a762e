"""Python files and modules of the user's own: policies, formats, benchmarks. Tested by `tests/routing/test_user_policy.py`."""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def import_user_module(name: str) -> ModuleType:
    """Import a module by its name, or a file by its path; a second time is no harm."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    key = "megavlm_user_" + re.sub(r"\W", "_", str(path))
    if key not in sys.modules:
        loader = importlib.machinery.SourceFileLoader(key, str(path))
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(key, loader, origin=str(path)))
        loader.exec_module(module)
        sys.modules[key] = module
    return sys.modules[key]


def import_attribute(name: str) -> Any:
    """The function or class that ``module:name`` or ``file.py:name`` names; raises whatever importing it raises."""
    module, _, attribute = name.rpartition(":")
    return getattr(import_user_module(module), attribute)
