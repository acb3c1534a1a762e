#!/usr/bin/env python
"""Draw docs/images/architecture.svg: from shards to a step, with what each part promises.  python tools/draw_architecture.py"""

from html import escape
from pathlib import Path

import fire

OUT = Path(__file__).parents[1] / "docs/images/architecture.svg"
WIDE, GAP, TALL = 164, 36, 92
BLUE, GREEN, ORANGE = "#3949ab", "#2e7d32", "#ef6c00"

PARTS = (
    ("shards", ("tar, JSONL, HTTP", "checked to the last byte"), BLUE, "sample"),
    ("lane", ("endless, deterministic", "the same at any world size"), BLUE, "tokens"),
    ("packer", ("every pack costs", "the same, per stage"), BLUE, "pack"),
    ("route", ("which image tokens are", "active in which layers"), GREEN, "rows"),
    ("backbone", ("a stock Hugging Face", "decoder, stage by stage"), GREEN, "losses"),
    ("engine", ("DeepSpeed ZeRO-3, guard", "watchdog, checkpoints"), ORANGE, ""),
)
"""(name, what it does, colour, what it hands on)."""
ACTIVE = (12, 6, 3, 6, 12)
"""Image tokens that are active in five groups of layers, for the picture of a route."""


def text(x: float, y: float, words: str, size: int = 12, **more: str) -> str:
    style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}" font-size="{size}"{style}>{escape(words)}</text>'


def box(x: float, name: str, lines: tuple[str, str], color: str) -> list[str]:
    middle = x + WIDE / 2
    words = [text(middle, 100 + 18 * i, line, 11, fill="#333", text_anchor="middle") for i, line in enumerate(lines)]
    title = text(middle, 74, name, 16, fill=color, text_anchor="middle", font_weight="bold")
    return [f'<rect x="{x}" y="48" width="{WIDE}" height="{TALL}" rx="8" fill="white" stroke="{color}" stroke-width="2"/>', title, *words]


def arrow(x: float, label: str) -> list[str]:
    line = f'<line x1="{x + 3}" y1="94" x2="{x + GAP - 5}" y2="94" stroke="#555" stroke-width="2" marker-end="url(#tip)"/>'
    return [line, text(x + GAP / 2, 40, label, 11, fill="#555", text_anchor="middle")]


def route(x: float, y: float) -> list[str]:
    """Layers upward, tokens across: text is always active, image tokens bypass the middle layers."""
    parts = []
    for layer, active in enumerate(ACTIVE):
        for token in range(18):
            is_text = token < 3 or token >= 15
            # spread evenly over the image
            is_active = is_text or (token - 3) * active // 12 != (token - 4) * active // 12
            color = "#9e9e9e" if is_text else GREEN if is_active else "#e0e0e0"
            parts.append(f'<rect x="{x + 15 * token}" y="{y - 15 * layer}" width="13" height="13" rx="2" fill="{color}"/>')
    return parts


def draw(out: str = str(OUT)):
    """Write the picture."""
    width = len(PARTS) * WIDE + (len(PARTS) - 1) * GAP + 40
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 290" font-family="Helvetica, Arial, sans-serif">',
        "<title>From shards to a step</title>",
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto">',
        '<path d="M0,0 L6,3 L0,6 z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="290" fill="#fafafa"/>',
    ]
    for number, (name, lines, color, handed) in enumerate(PARTS):
        x = 20 + number * (WIDE + GAP)
        svg += box(x, name, lines, color)
        if handed:
            svg += arrow(x + WIDE, handed)
    svg += route(500, 260)
    notes = [
        (20, 182, "every rank runs its share of the lanes:", "#333"),
        (20, 200, "no communication, no surprise after a restart", "#333"),
        (20, 236, "one set of weights reads images and draws them", "#333"),
        (800, 182, "tokens of a sample across, layers upward", "#333"),
        (800, 206, "■ text: always active", "#757575"),
        (800, 226, "■ image token, active", GREEN),
        (800, 246, "■ image token that bypasses these layers", "#bdbdbd"),
    ]
    svg += [text(x, y, words, 12, fill=color) for x, y, words, color in notes]
    Path(out).write_text("\n".join([*svg, "</svg>\n"]))
    print(out)


if __name__ == "__main__":
    fire.Fire(draw)
