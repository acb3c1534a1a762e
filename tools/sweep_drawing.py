#!/usr/bin/env python
"""How do trained runs draw best? Guidance, temperature and the route of guidance's unconditional half, the same tries for every run.

    python tools/sweep_drawing.py "runs/study-digits/runs/*" --out=runs/sweep

Every run is judged by its benchmark in every setting. For each metric its best setting is chosen by these drawings, and what is reported is
judged on others, with random numbers of their own: more tries must not pass for better drawings. A run for which a route is the same as
another, or impossible, tries as many settings as the others; the same drawings stand for both.

Writes OUT/sweep.json after every setting, and OUT/sweep.png; the same command goes on where it was stopped. Prints a table.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import fire

from megavlm.config import RunConfig
from megavlm.errors import ConfigError
from megavlm.evaluation.benchmark import Benchmark, find_benchmark
from megavlm.evaluation.evaluate import samples_to_judge
from megavlm.evaluation.trained import TrainedModel
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_trained
from megavlm.system.files import write_atomically
from megavlm.system.pictures import pyplot, save_figure

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
ROUTES = ("dense", "trained")
METRICS = {"accuracy_by_judge": "high", "frechet_distance": "low"}
TO_CHOOSE, TO_REPORT = 0, 1
"""Streams of random numbers."""


class Setting(NamedTuple):
    """One way to draw."""

    guidance: float
    temperature: float
    guidance_route: str

    @property
    def name(self) -> str:
        return f"guidance {self.guidance:g}, temperature {self.temperature:g}, {self.guidance_route}"


@dataclass
class Subject:
    """A run and its judge."""

    model: TrainedModel
    parts: Parts
    benchmark: Benchmark

    def judged(self, setting: Setting, stream: int) -> dict[str, float]:
        """The numbers that the judge gives for drawings in a setting."""
        evaluation = self.model.config.model_copy(update=setting._asdict())
        costing = self.parts.replaced(evaluation=evaluation).guidance_costing
        model = replace(self.model, config=evaluation, guidance_costing=costing)
        drawn = model.image_tokenizer.decode(model.draw(self.benchmark.requests, stream))
        return {name: float(value) for name, value in self.benchmark.judge(drawn).items() if isinstance(value, (int, float))}

    def same_as(self, setting: Setting) -> Setting:
        """The setting that draws the same and stands for this one."""
        if setting.guidance == 1 or not has_route(self.parts.config):
            return setting._replace(guidance_route=self.model.config.route)
        return setting


def has_route(config: RunConfig) -> bool:
    """Whether a run has a route of its own to draw along: neither dense nor a way to train only."""
    policy = config.routing.generation
    return policy.policy != "dense" and policy.patch_size == 1


class Sweep:
    """The results so far, on the disk after each.

    Args:
        out: Folder for them.
        settings: What every run tries.
        metrics: Name → whether high or low is better.
    """

    def __init__(self, out: Path, settings: list[Setting], metrics: dict[str, str]):
        self.path = out / "sweep.json"
        self.settings = settings
        self.metrics = metrics
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, subject: Subject) -> None:
        """Judge a run in all settings, and its best ones again."""
        found = self.results.setdefault(name, {"tries": {}, "best": {}, "again": {}})
        for setting in self.settings:
            self._judge(found["tries"], subject, setting, TO_CHOOSE)
        for metric, better in self.metrics.items():
            best = (min if better == "low" else max)(found["tries"], key=lambda name: found["tries"][name][metric])
            setting = next(setting for setting in self.settings if setting.name == best)
            self._judge(found["again"], subject, setting, TO_REPORT)
            found["best"][metric] = {"setting": best, "value": found["again"][best][metric], "when_chosen": found["tries"][best][metric]}
        self._write()

    def _judge(self, found: dict[str, Any], subject: Subject, setting: Setting, stream: int) -> None:
        if setting.name in found:
            return
        same = subject.same_as(setting).name
        found[setting.name] = found[same] if same in found else subject.judged(subject.same_as(setting), stream)
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.results, indent=2))

    def table(self) -> Iterator[str]:
        """The best of each run, as Markdown."""
        yield "| run | " + " | ".join(f"{metric} | in the setting" for metric in self.metrics) + " |"
        yield "|---" * (1 + 2 * len(self.metrics)) + "|"
        for name, found in self.results.items():
            cells = [f"{of['value']:.3f} | {of['setting']}" for of in found["best"].values()]
            yield f"| {name} | " + " | ".join(cells) + " |"

    def picture(self) -> None:
        """Each metric over guidance, at the best temperature."""
        figure, axes = pyplot.subplots(1, len(self.metrics), figsize=(6 * len(self.metrics), 4), squeeze=False, layout="constrained")
        for axis, (metric, better) in zip(axes[0], self.metrics.items()):
            for name, found in self.results.items():
                for route in dict.fromkeys(setting.guidance_route for setting in self.settings):
                    best = {}
                    for setting in self.settings:
                        if setting.guidance_route == route and setting.name in found["tries"]:
                            best.setdefault(setting.guidance, []).append(found["tries"][setting.name][metric])
                    values = [(min if better == "low" else max)(of) for of in best.values()]
                    axis.plot(list(best), values, "-" if route == "dense" else "--", label=f"{name}, {route}")
            axis.set(xlabel="guidance", title=f"{metric} ({better} is better), best temperature")
        axes[0][0].legend(fontsize=6)
        save_figure(figure, self.path.with_suffix(".png"))


def subject_of(run: str, num_drawings: int) -> Subject:
    """A run with its benchmark.

    Raises:
        ConfigError: If its recipe names none.
    """
    model, parts = load_trained(run, {"evaluation.num_drawings": num_drawings})
    if model.config.benchmark is None:
        raise ConfigError(f"{run}: its recipe has no evaluation.benchmark, so nobody judges drawings\n  do:    sweep runs that have one")
    samples = samples_to_judge(model, parts.config.validation)
    return Subject(model, parts, find_benchmark(model.config.benchmark)(samples, num_drawings, model.image_tokenizer))


def main(
    *runs: str,
    out: str,
    num_drawings: int = 300,
    guidances: tuple[float, ...] = GUIDANCES,
    temperatures: tuple[float, ...] = TEMPERATURES,
    routes: tuple[str, ...] = ROUTES,
):
    """Sweep over how runs draw.

    Args:
        runs: Run folders; patterns are expanded.
        out: Folder for the results.
        num_drawings: Drawings in each setting.
        guidances: Scales of guidance.
        temperatures: Temperatures.
        routes: Routes of the unconditional half: dense, trained.
    """
    settings = [Setting(float(g), float(t), route) for g, t, route in product(guidances, temperatures, routes)]
    sweep = Sweep(Path(out), settings, METRICS)
    for run in [path for pattern in runs for path in sorted(glob(pattern)) or [pattern]]:
        sweep.run(Path(run).name, subject_of(run, num_drawings))
    sweep.picture()
    print("\n".join(sweep.table()))


if __name__ == "__main__":
    fire.Fire(main)
