"""Shards for people: statistics with histograms, and a preview as contact sheet and page."""

import base64
import html
import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from megavlm.data.pack.encode import Encoder
from megavlm.data.read.sample import Sample
from megavlm.data.tools.lint import Report, read_samples
from megavlm.errors import DataError
from megavlm.system.pictures import pyplot, save_figure, save_grid
from megavlm.vocabulary import Vocabulary

THUMBNAIL_PIXELS = 256


def stats(urls: list[str], source, out: Path, encoder: Encoder | None = None) -> dict:
    """Count what is in shards.

    Args:
        urls: The shards.
        source: A `SourceConfig`: the format and its options.
        out: Histogram to write (PNG): tokens per sample by task with an encoder, else characters; with one also how often ids occur.
        encoder: Of a recipe, to count tokens.

    Returns:
        Samples, problems, tasks, images and their sizes, and quantiles of the lengths by task; with an encoder, for text, special tokens
        and image codes, how many tokens there are, how many ids occur, and their perplexity: as many ids, evenly used, would be as hard
        to guess.
    """
    report, tasks, sizes, lengths = Report(), Counter(), Counter(), {}
    counts_V = np.zeros(encoder.vocabulary.size if encoder else 0, np.int64)
    for sample in read_samples(urls, source, report):
        try:
            if encoder:
                tokens = encoder(sample).tokens
                length = len(tokens)
                np.add.at(counts_V, tokens, 1)
            else:
                length = sum(len(s.text or "") for s in sample.segments)
        except DataError as error:
            report.add(error, urls[sample.coordinates.shard], sample.key)
            continue
        tasks[sample.task] += 1
        sizes.update(f"{im.shape[1]}x{im.shape[0]}{' codes' if im.dtype == np.int64 else ''}" for im in sample.images.values())
        lengths.setdefault(sample.task, []).append(length)
    unit = "tokens" if encoder else "characters"
    by_group = _by_group(counts_V, encoder.vocabulary) if encoder else {}
    if lengths:
        _histogram(lengths, unit, by_group, out)
    return {
        "samples": report.num_samples,
        "problems": len(report.problems),
        "tasks": dict(tasks),
        "images": dict(sizes.most_common(20)),
        unit: {task: _quantiles(values) for task, values in lengths.items()},
        **({"ids": {name: _use(counts) for name, counts in by_group.items()}} if encoder else {}),
    }


def _by_group(counts_V: np.ndarray, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    special = list(vocabulary.specials.values())
    text = counts_V[vocabulary.is_text(np.arange(len(counts_V)))]
    return {"text": text, "special": counts_V[special], "image codes": counts_V[vocabulary.first_code : vocabulary.end_code]}


def _use(counts: np.ndarray) -> dict[str, float]:
    share = counts[counts > 0] / max(1, counts.sum())
    return {
        "tokens": int(counts.sum()),
        "ids": len(counts),
        "ids_used": int((counts > 0).sum()),
        "perplexity": round(float(np.exp(-(share * np.log(share)).sum())), 1),
    }


def _quantiles(values: list[int]) -> dict[str, float]:
    points = np.quantile(values, [0, 0.5, 0.9, 0.99, 1]).round(1).tolist()
    return {"mean": round(float(np.mean(values)), 1), **dict(zip(("min", "median", "p90", "p99", "max"), points))}


def _histogram(lengths: dict[str, list[int]], unit: str, by_group: dict[str, np.ndarray], out: Path) -> None:
    figure, axes = pyplot.subplots(1, 2 if by_group else 1, figsize=(13 if by_group else 7, 4), layout="constrained", squeeze=False)
    axis = axes[0, 0]
    longest = max(max(values) for values in lengths.values())
    for task, values in lengths.items():
        axis.hist(values, np.linspace(0, longest + 1, 60), histtype="step", label=f"{task} ({len(values)})")
    axis.set(xlabel=f"{unit} per sample", ylabel="samples")
    axis.legend()
    for name, counts in by_group.items():
        used = np.sort(counts[counts > 0])[::-1]
        axes[0, 1].loglog(np.arange(1, len(used) + 1), used, ".-", label=f"{name}: {len(used)} of {len(counts)} ids")
    if by_group:
        axes[0, 1].set(xlabel="ids, the most frequent first", ylabel="how often each occurs")
        axes[0, 1].legend()
    save_figure(figure, out)


def preview(urls: list[str], source, out: Path, num_samples: int = 40) -> tuple[Report, bool]:
    """Show the first samples of shards: a page with the whole texts (HTML) and, beside it, `contact_sheet` ``out`` (PNG)."""
    report = Report()
    samples = list(islice(read_samples(urls, source, report), num_samples))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".html").write_text(_page(samples), encoding="utf-8")
    return report, contact_sheet(samples, out)


def contact_sheet(samples: list[Sample], out: Path) -> bool:
    """Write a PNG with the first image of each sample that has one; whether there was any."""
    return write_sheet([thumbnail(sample) for sample in samples if sample.images], out)


def thumbnail(sample: Sample) -> tuple[np.ndarray, str]:
    """The first image of a sample, made small, and a caption."""
    image = Image.fromarray(_pixels(next(iter(sample.images.values()))))
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return np.array(image), f"{sample.task}\n{_text(sample)[:34]}"


def write_sheet(thumbnails: list[tuple[np.ndarray, str]], out: Path) -> bool:
    """Write a PNG of thumbnails; whether there was any."""
    if thumbnails:
        images, captions = zip(*thumbnails)
        save_grid(images, captions, out, columns=8)
    return bool(thumbnails)


def _pixels(image: np.ndarray) -> np.ndarray:
    # codes without their tokenizer: shown as grey levels
    return image if image.dtype == np.uint8 else (255 * image / max(1, image.max())).astype(np.uint8)


def _text(sample: Sample) -> str:
    return " | ".join(segment.text for segment in sample.segments if segment.text)


def _page(samples: list[Sample]) -> str:
    rows = []
    for sample in samples:
        parts = []
        for segment in sample.segments:
            if segment.image is not None:
                content = io.BytesIO()
                Image.fromarray(_pixels(sample.images[segment.image])).save(content, "PNG")
                picture = base64.b64encode(content.getvalue()).decode()
                shown = f'<img src="data:image/png;base64,{picture}">'
            else:
                assert segment.text is not None  # a segment has either text or image
                shown = html.escape(segment.text)
            parts.append(f'<div class="{"loss" if segment.loss else "given"}">{shown}</div>')
        meta = html.escape(json.dumps(sample.meta, ensure_ascii=False)) if sample.meta else ""
        head = f"<h2>{html.escape(sample.key)} <small>{sample.task} {meta}</small></h2>"
        rows.append(f"<section>{head}{''.join(parts)}</section>")
    style = (
        "body{font:14px sans-serif;max-width:60em;margin:2em auto}h2{font-size:1em}small{color:#666;font-weight:normal}"
        "img{image-rendering:pixelated;min-width:96px;max-width:384px}.loss{border-left:4px solid #2a7;padding-left:8px}"
        ".given{border-left:4px solid #ccc;padding-left:8px}div{margin:4px 0}"
    )
    legend = "<p>Green: what the model learns to predict.</p>"
    return f'<!doctype html><meta charset="utf-8"><title>preview</title><style>{style}</style>{legend}{"".join(rows)}'
