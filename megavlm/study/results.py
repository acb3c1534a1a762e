"""Reads the runs of a study into a table of numbers per (policy, data, seed). Tested by `tests/study/test_report.py`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import complete_checkpoints
from megavlm.study.runner import is_judged
from megavlm.study.spec import DENSE, JOINT, Arm, Metric, StudyConfig
from megavlm.system.files import read_json


@dataclass
class Results:
    """The numbers of the judged arms of a study."""

    study: StudyConfig
    runs: dict[tuple[str, str, int], dict[str, Any]]
    """(policy, data, seed) → evaluation and totals of the run."""

    def seeds(self, policy: str) -> list[int]:
        """The seeds whose arms of a policy and of dense training are all judged; only these are compared."""
        wanted = [(name, data) for name in (DENSE, policy) for data in (JOINT, *self.study.tasks)]
        return self._complete(wanted)

    def seeds_of_curve(self, policy: str) -> list[int]:
        """Those of `seeds` whose dense runs of every length are judged as well; empty if the study has no lengths."""
        of_lengths = self._complete([(name, JOINT) for name in self.study.lengths]) if self.study.lengths else []
        return [seed for seed in self.seeds(policy) if seed in of_lengths]

    def _complete(self, arms: list[tuple[str, str]]) -> list[int]:
        return [seed for seed in [*self.study.seeds, *self.study.more_seeds] if all((*arm, seed) in self.runs for arm in arms)]

    def metric(self, policy: str, data: str, metric: Metric, seeds: list[int]) -> np.ndarray:
        """A metric ``[num_seeds]``, signed so that higher is better."""
        sign = 1 if metric.better == "high" else -1
        return sign * np.array([number_at(self.runs[policy, data, seed]["evaluation"], metric.path) for seed in seeds])

    def total(self, policy: str, data: str, name: str, seeds: list[int]) -> np.ndarray:
        """One of the run's totals (`megavlm.monitor.metrics.TOTALS`) ``[num_seeds]``."""
        return np.array([self.runs[policy, data, seed]["totals"][name] for seed in seeds])


def collect(study: StudyConfig, arms: list[Arm]) -> Results:
    """Read the judged arms; unfinished ones are left out."""
    runs = {}
    for arm in filter(is_judged, arms):
        folder = RunFolder(arm.folder)
        state = read_json(complete_checkpoints(folder.checkpoints)[-1] / "state.json")
        run = {"evaluation": read_json(folder.evaluation), "totals": state["totals"], "folder": arm.folder.name}
        runs |= {(policy, arm.data, arm.seed): run for policy in arm.policies}
    return Results(study, runs)


def number_at(tree: Any, path: str) -> float:
    """A number of ``evaluation.json`` by its dotted path."""
    for name in path.split("."):
        tree = tree[name]
    return float(tree)
