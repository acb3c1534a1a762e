"""When checkpoints are written, and which of them stay. Tested by `tests/runs/test_manifest.py`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megavlm.errors import MegavlmError
from megavlm.runs.manifest import read_manifest, step_of
from megavlm.settings import Count, Positive, Settings, Switch


class CheckpointConfig(Settings):
    """When checkpoints are written and how many stay. One is always written at the end."""

    every_steps: Positive = 500
    """Steps between checkpoints."""
    background: Switch = True
    """Write from a copy in host memory while training continues; otherwise training waits."""
    keep_last: Positive = 2
    """How many of the newest stay."""
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this stay for ever."""
    keep_best: Count = 0
    """How many of the best by `best_metric` stay as well."""
    best_metric: str | None = None
    """TensorBoard tag that `keep_best` ranks by; its last value before the save counts. `loss/...` is the training loss. No default."""
    best_mode: Literal["min", "max"] = "min"
    """Whether small or large values are good."""

    def doomed(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Those of ``checkpoints`` (oldest first) that may go."""
        staying = set(checkpoints[-self.keep_last :])
        if self.keep_every_steps:
            staying |= {path for path in checkpoints if step_of(path) % self.keep_every_steps == 0}
        if self.keep_best:
            rated = []
            for path in checkpoints:
                try:
                    value = read_manifest(path)["metrics"].get(self.best_metric)
                except MegavlmError:  # it may be the best
                    staying.add(path)
                    continue
                if value is not None and math.isfinite(value):
                    rated.append((value, path))
            rated.sort()
            # of equal ones the newest
            best = rated[-self.keep_best :] if self.best_mode == "max" else sorted(rated, key=_small_then_new)[: self.keep_best]
            staying |= {path for _, path in best}
        return [path for path in checkpoints if path not in staying]


def _small_then_new(pair: tuple[float, Path]) -> tuple[float, int]:
    return pair[0], -step_of(pair[1])
