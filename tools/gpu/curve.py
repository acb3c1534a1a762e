"""The loss curve of a training on the CPU in float32: ``python -m tools.gpu.curve FOLDER WIDTH OUT.json``.

Tested by `tests/tools/test_gpu_check.py`.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from megavlm.system import world as distributed
from tools.gpu import training
from tools.gpu.context import CPU, Context
from tools.gpu.record import Record


class OfWidth(Context):
    """A CPU that trains a model of the other device's width."""

    width = 0

    @property
    def sizes(self):  # type: ignore[override]
        return dataclasses.replace(CPU, engine_width=self.width)


def main(folder: str, width: str, out: str) -> None:
    context = OfWidth(torch.device("cpu"), Record(Path(out).with_suffix(".none")), Path(folder), Path(folder))
    context.width = int(width)
    found = training.train(distributed.start(600), training.recipe(context, Path(folder) / "curve-on-cpu", {"model.dtype": "float32"}))
    Path(out).write_text(json.dumps(found["losses"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
