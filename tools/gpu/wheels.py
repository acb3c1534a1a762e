"""Which packages a machine with only torch and transformers lacks, as this environment has them: ``NAME==VERSION``, a line each.

    python -m tools.gpu.wheels            # what every section but the last needs
    python -m tools.gpu.wheels study      # what the last needs besides

`tools/gpu_wheels.sh` gathers their wheels. Tested by `tests/tools/test_gpu_check.py`.
"""

import platform
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

THERE = {
    *("torch", "filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "triton", "typing-extensions"),
    *("transformers", "huggingface-hub", "numpy", "packaging", "pyyaml", "regex", "safetensors", "tokenizers", "tqdm", "typer"),
}
"""What the machine has: torch and transformers, with what every version of them that we take needs."""
STUDY_ONLY = {"scipy", "scikit-learn", "joblib", "narwhals", "threadpoolctl"}
"""What only the benchmarks of the section study need; half of the size of everything."""
UNUSED = {"grpcio", "tensorboard-data-server"}
"""TensorBoard's server needs them, its files do not."""
PYTHON = "3.12"


def lacking() -> dict[str, str]:
    """What megavlm needs and a machine with torch and transformers lacks: name → the version that is installed here."""
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "platform_machine": "x86_64", "extra": ""}
    found: dict[str, str] = {}
    todo = ["megavlm"]
    while todo:
        package = distribution(todo.pop())
        for line in package.requires or []:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in found or name in THERE | UNUSED or (requirement.marker and not requirement.marker.evaluate(environment)):
                continue
            found[name] = distribution(name).version
            todo.append(name)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    assert platform.system() == "Linux", "wheels for Linux are gathered on Linux"
    wants_study = sys.argv[1:] == ["study"]
    print("\n".join(f"{name}=={version}" for name, version in lacking().items() if (name in STUDY_ONLY) == wants_study))
