"""Who else gets a run's numbers: a CSV file, W&B, MLflow; on this machine only, nothing is sent.

A run that resumes writes on: steps are numbered on, and a CSV file takes back what comes again.
"""

import csv
import hashlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from megavlm.errors import ConfigError
from megavlm.system.files import write_atomically

WriterName = Literal["tensorboard", "csv", "wandb", "mlflow"]


class Writer(Protocol):
    """Made from the run folder and the first step that is written."""

    def __init__(self, folder: Path, first_step: int): ...

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers, by their tags."""
        ...

    def close(self) -> None:
        """No more is written."""
        ...


class CsvWriter:
    """``RUN/scalars.csv``: lines of step, tag, value."""

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / "scalars.csv"
        rows = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                # the last line may be cut where a run was killed
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) < first_step]
        write_atomically(self.path, _lines([("step", "tag", "value"), *rows]))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        # opened each time: a disk that was full may have room again
        with self.path.open("a", newline="") as file:
            file.write(_lines([(step, tag, repr(float(value))) for tag, value in values.items()]))

    def close(self) -> None:
        pass


class WandbWriter:
    """``RUN/wandb/``: offline; `wandb sync RUN/wandb/offline-run-…` sends it."""

    def __init__(self, folder: Path, first_step: int):
        import wandb  # pyright: ignore[reportMissingImports] (optional)

        self._run = wandb.init(
            mode="offline",
            project="megavlm",
            name=folder.name,
            # the same run after a resume
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """``RUN/mlflow.db``: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it."""

    def __init__(self, folder: Path, first_step: int):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # pyright: ignore[reportMissingImports] (optional)

        self._client = mlflow.MlflowClient(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        known = self._client.get_experiment_by_name("megavlm")
        experiment = known.experiment_id if known else self._client.create_experiment("megavlm")
        earlier = self._client.search_runs([experiment], max_results=1)
        # the same run after a resume
        self._run = earlier[0].info.run_id if earlier else self._client.create_run(experiment, run_name=folder.name).info.run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._client.log_metric(self._run, tag, float(value), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "alembic")}  # mlflow-skinny has no database
WRITERS: dict[str, type[Writer]] = {"csv": CsvWriter, "wandb": WandbWriter, "mlflow": MlflowWriter}


def check_writers(names: Sequence[str]) -> None:
    """Refuse writers whose package is not installed here.

    Raises:
        ConfigError: With how to install them.
    """
    missing = [name for name in names if any(importlib.util.find_spec(package) is None for package in PACKAGES.get(name, ()))]
    if missing:
        raise ConfigError(
            f"monitor.writers: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed\n"
            f"  do:    pip install {' '.join(missing)}, or leave it out"
        )


def _lines(rows) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
