#!/usr/bin/env python
"""What an evaluated run of `digits` has achieved: a table here, and RUN/page.html with losses, drawings and answers (no network).

    python tools/page.py runs/digits [--beside=runs/digits-dense]

``beside`` is the same training without a route; without that run its kept figures are shown (docs/results/quickstart_dense.json).
"""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import fire
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich import print as show
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavlm.data.read.sample import Coordinates, Sample, parse_sample
from megavlm.data.read.shards import expand_shards, read_shard
from megavlm.evaluation.sampling import answer
from megavlm.evaluation.trained import TrainedModel
from megavlm.parts.trained import load_trained
from megavlm.runs.folder import RunFolder
from megavlm.system.files import write_atomically

KEPT = Path(__file__).parents[1] / "docs/results/quickstart_dense.json"
NUM_ANSWERS = 40
SCORES = (
    "reads: right answer scored highest",
    "reads: right answer written freely",
    "draws: judge sees the requested digit",
    "draws: Fréchet distance, lower is closer",
)

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>
body {font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff}
h1 {margin-bottom: 0} h2 {margin-top: 2.5rem} .note {color: #666}
table {border-collapse: collapse} td, th {padding: .35rem 1rem; border-bottom: 1px solid #ddd; text-align: right}
td:first-child, th:first-child {text-align: left}
img.wide {max-width: 100%} img.code {width: 64px; height: 64px; image-rendering: pixelated; border: 1px solid #ddd}
.answers {display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 1rem; text-align: center}
.wrong {color: #b71c1c; font-weight: bold} pre {background: #f5f5f5; padding: 1rem; overflow-x: auto}
</style>"""


def page(run: str, beside: str | None = None):
    """Print the table and write the page.

    Args:
        run: The run folder, after `megavlm evaluate` and `tools/compare_with_dense.py`.
        beside: The run folder of the same training without a route.
    """
    folder = RunFolder(run)
    evaluation, speed = json.loads(folder.evaluation.read_text()), json.loads((folder.path / "speed.json").read_text())
    rows = figures(evaluation, speed, _without_a_route(beside))
    table = Table("", "this run", "without a route", "real digits", title=f"{run}, {evaluation['checkpoint']}")
    for row in rows:
        table.add_row(*row)
    show(table)
    model, _ = load_trained(run, {})
    parts = [
        f"{HEAD}<title>{escape(run)}</title><h1>{escape(run)}</h1>",
        f'<p class="note">{escape(evaluation["checkpoint"])}: one model that reads handwritten digits and draws them.</p>',
        "<h2>Figures</h2>",
        _table(("", "this run", "without a route", "real digits"), rows),
        '<p class="note">Without a route: <code>bash tools/quickstart.sh dense</code>. Drawings are judged by a support vector machine on'
        " real digits; its own accuracy on held-out ones is the ceiling.</p>",
        f"<h2>It draws</h2>{_embedded(folder.path / 'drawings.png')}",
        f"<h2>It reads</h2><p>Held-out images, and what the model writes. Mistakes are red.</p>{answers(model)}",
        f"<h2>It learnt</h2>{curves(folder)}",
        *(f"<h2>Drawings on the way: {escape(path.stem)}</h2>{_embedded(path)}" for path in sorted(folder.samples.glob("*.png"))),
        f"<h2>Recipe</h2><pre>{escape(folder.config_file.read_text())}</pre>",
    ]
    write_atomically(folder.path / "page.html", "\n".join(parts))
    show(f"open         {folder.path}/page.html")
    show(f"curves       tensorboard --logdir {folder.tensorboard}")
    show(f'draw more    .venv/bin/megavlm generate {run} "a handwritten seven" --out grid.png')


def figures(evaluation: dict[str, Any], speed: dict[str, Any], dense: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """Rows of the table: what, this run, without a route, real digits."""
    real = evaluation["generation"]
    limits = (f"{real['judge_accuracy_on_held_out_real_digits']:.1%}", f"{real['frechet_distance_of_real_training_digits']:.0f}")
    columns = zip(_scores(evaluation), _scores(dense) if dense else ("not measured",) * len(SCORES), ("", "", *limits))
    return [
        *((words, *cells) for words, cells in zip(SCORES, columns)),
        ("FLOPs of the same packs", f"{speed['flops_share']:.1%}", "100%", ""),
        ("time of the same packs", f"{speed['time_share']:.1%}", "100%", ""),
    ]


def answers(model: TrainedModel) -> str:
    """Held-out images with what the model writes about them."""
    questions = [sample for sample in _held_out(model) if "answer" in sample.meta][:NUM_ANSWERS]
    prompts = [model.encoder(sample).prompt() for sample in questions]
    given = answer(model.backbone, model.encoder, prompts, model.costing, device=model.device)
    cells = [_answer(sample, text.strip()) for sample, text in zip(questions, given)]
    return f'<div class="answers">{"".join(cells)}</div>'


def curves(folder: RunFolder) -> str:
    """The training losses as a drawing."""
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, 2), ("understanding", "generation")):
        points = events.Scalars(f"loss/{task}")
        axes.plot([point.step for point in points], [point.value for point in points])
        axes.set(title=f"{task}: loss per token", xlabel="step", yscale="log")
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _held_out(model: TrainedModel) -> list[Sample]:
    shards = expand_shards("evaluation", model.config.shards or [])
    return [parse_sample(key, members, Coordinates(0, 0, 0, 0)) for url in shards for key, members in read_shard(url)]


def _answer(sample: Sample, text: str) -> str:
    png = io.BytesIO()
    Image.fromarray(np.asarray(next(iter(sample.images.values())), np.uint8)).save(png, "PNG")
    kind = "right" if text == sample.meta["answer"] else "wrong"
    return f'<div>{_image(png.getvalue(), "code")}<br><span class="{kind}">{escape(text) or "(nothing)"}</span></div>'


def _scores(evaluation: dict[str, Any]) -> tuple[str, ...]:
    reads, draws = evaluation["understanding"], evaluation["generation"]
    shares = reads["accuracy_by_scoring"], reads["accuracy_by_free_generation"], draws["accuracy_by_judge"]
    return (*(f"{share:.1%}" for share in shares), f"{draws['frechet_distance']:.0f}")


def _without_a_route(beside: str | None) -> dict[str, Any] | None:
    file = RunFolder(beside).evaluation if beside else KEPT
    return json.loads(file.read_text()) if file.exists() else None


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _embedded(path: Path) -> str:
    return _image(path.read_bytes(), "wide")


def _image(png: bytes, kind: str) -> str:
    return f'<img class="{kind}" alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


if __name__ == "__main__":
    fire.Fire(page)
