"""The runs of a study on TensorBoard's page HParams: policy, data and seed of every arm beside its metrics and cost.

Tested by `tests/study/test_report.py`.
"""

import shutil
from pathlib import Path

from torch.utils.tensorboard.summary import hparams, scalar

from megavlm.monitor.event_file import EventFile
from megavlm.study.results import Results, number_at
from megavlm.system.harmless import harmless


def write_hparams(results: Results, folder: Path) -> None:
    """Write ``folder`` anew, with a run for each judged arm.

    Args:
        results: The numbers.
        folder: Where ``tensorboard --logdir`` looks.
    """
    with harmless(str(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        for (policy, data, seed), run in results.runs.items():
            values = {"cost/PFLOPs": run["totals"]["executed_flops"] / 1e15, "cost/CPU minutes": run["totals"]["cpu_seconds"] / 60}
            for task, settings in results.study.tasks.items():
                if data in ("joint", task):
                    values |= {f"{task}/{metric.name}": number_at(run["evaluation"], metric.path) for metric in settings.metrics}
            file = EventFile(folder / f"{policy}-{data}-{seed}", None)
            for summary in hparams({"policy": policy, "data": data, "seed": seed}, dict.fromkeys(values, 0.0)):
                file.add(summary, 0)
            for tag, value in values.items():
                file.add(scalar(tag, value), 0)
            file.close()
