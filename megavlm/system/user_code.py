"""Python files and modules of the user's own: policies, formats, benchmarks."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Import a module by its name, or a file by its path; a second time is no harm."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    key = "megavlm_user_" + re.sub(r"\W", "_", str(path))
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[key] = module
    return sys.modules[key]
