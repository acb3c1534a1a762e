"""``shapes``: an endless, seeded, compositional benchmark. One to four coloured shapes with size, place and relation on white.

Everything about a scene follows from (seed, split, number). Scenes are read (questions about count, colour, relation and existence, each
with one exact answer) and drawn (from captions). Held-out compositions, `HELD_OUT`, are pairs of colour and form that no training scene
shows. The splits:

    train    scenes without held-out compositions
    seen     test scenes like those of training
    test     test scenes, each with at least one held-out composition
    images   all compositions alike, to train an image tokenizer on: it should not be worse at compositions that the model has never seen

`see` finds the shapes in an image again, so that a drawing can be judged exactly: is there
a red circle left of a blue square?
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from webdataset.writer import TarWriter

from megavlm.data.read.index import write_index
from megavlm.data.read.sample import Record, Segment
from megavlm.errors import MegavlmError
from megavlm.randomness import Purpose, stream
from megavlm.routing.tasks import TaskName
from megavlm.vocabulary import train_text_model

COLORS = {
    "red": (230, 25, 25), "green": (25, 160, 25), "blue": (25, 60, 230), "yellow": (240, 220, 20),
    "purple": (150, 30, 180), "black": (20, 20, 20),
}  # fmt: skip
FORMS = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
SIDES = {"small": 0.19, "large": 0.28}
"""Height and width of a shape as a share of the image."""
NUMBERS = ("zero", "one", "two", "three", "four")
HELD_OUT = {("red", "triangle"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")}
SPLITS = ("train", "test", "seen", "images")
CELLS = 3
"""Cells on each side of the grid; each shape has a cell of its own."""


@dataclass(frozen=True)
class Shape:
    """One shape; x and y of its centre are shares of the image, from the upper left."""

    color: str
    form: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.form}"


Scene = tuple[Shape, ...]


def scene(seed: int, split: str, number: int) -> Scene:
    """The scene with a number; no two of its shapes have the same colour and form."""
    rng = stream(seed, Purpose.SYNTHETIC, SPLITS.index(split), number)
    every = [(color, form) for color in COLORS for form in FORMS]
    usual = [kind for kind in every if kind not in HELD_OUT]
    num = int(rng.integers(1, 5))
    if split != "test":
        allowed = every if split == "images" else usual
        kinds = [allowed[i] for i in rng.permutation(len(allowed))[:num]]
    else:
        first = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        rest = [kind for kind in every if kind != first]
        kinds = [first, *(rest[i] for i in rng.permutation(len(rest))[: num - 1])]
    cells = rng.permutation(CELLS * CELLS)[:num]
    shapes = []
    for (color, form), cell in zip(kinds, cells.tolist()):
        size = SIZES[int(rng.integers(2))]
        # a shape may move in its cell as long as it does not touch its border
        slack = (1 / CELLS - SIDES[size]) / 2 - 0.02
        dx, dy = rng.uniform(-slack, slack, 2) if slack > 0 else (0.0, 0.0)
        x, y = (cell % CELLS + 0.5) / CELLS + dx, (cell // CELLS + 0.5) / CELLS + dy
        shapes.append(Shape(color, form, size, float(x), float(y)))
    return tuple(shapes)


def _mask(form: str, size: str, pixels: int) -> np.ndarray:
    """The pixels of a form in its square box, boolean."""
    side = max(4, round(SIDES[size] * pixels))
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    if form == "circle":
        return x**2 + y**2 <= 1
    if form == "square":
        return np.ones((side, side), bool)
    if form == "triangle":
        # half a pixel more, or the tip would be empty in an even box
        return np.abs(x) <= (y + 1) / 2 + 0.5 / side + 1e-9
    return (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)


def render(shapes: Scene, pixels: int) -> np.ndarray:
    """Draw a scene: uint8 RGB ``[pixels, pixels, 3]``, for 32 to 256 pixels."""
    image = np.full((pixels, pixels, 3), 255, np.uint8)
    for shape in shapes:
        mask = _mask(shape.form, shape.size, pixels)
        top, left = (round(place * pixels - len(mask) / 2) for place in (shape.y, shape.x))
        image[top : top + len(mask), left : left + len(mask)][mask] = COLORS[shape.color]
    return image


def see(image: np.ndarray) -> Scene:
    """The shapes in an image: connected pixels nearest to one colour, and the form that overlaps them most.

    Exact on images from `render`. Specks below a third of a small shape's area are ignored, as are blots that no form overlaps by half.
    """
    pixels = len(image)
    palette = np.array([*COLORS.values(), (255, 255, 255)], np.float64)
    nearest = np.linalg.norm(image[:, :, None].astype(np.float64) - palette, axis=3).argmin(2)
    found = []
    for number, color in enumerate(COLORS):
        labels: np.ndarray = ndimage.label(nearest == number, structure=np.ones((3, 3)))[0]  # type: ignore[index] (its stub lacks the pair)
        for label, box in enumerate(ndimage.find_objects(labels), 1):
            blot = labels[box] == label
            if blot.sum() < (SIDES["small"] * pixels) ** 2 / 6:
                continue
            score, form, size = max((_overlap(blot, _mask(f, s, pixels)), f, s) for f in FORMS for s in SIZES)
            if score >= 0.5:
                y, x = ((part.start + part.stop) / 2 / pixels for part in box)
                found.append(Shape(color, form, size, x, y))
    return tuple(found)


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks, centred on each other."""
    side = max(*first.shape, *second.shape)
    placed = []
    for mask in (first, second):
        canvas = np.zeros((side, side), bool)
        top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
        canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        placed.append(canvas)
    return float((placed[0] & placed[1]).sum() / (placed[0] | placed[1]).sum())


RELATIONS = {
    "left of": lambda a, b: b.x - a.x > 1 / CELLS / 2,
    "right of": lambda a, b: a.x - b.x > 1 / CELLS / 2,
    "above": lambda a, b: b.y - a.y > 1 / CELLS / 2,
    "below": lambda a, b: a.y - b.y > 1 / CELLS / 2,
}
"""A relation holds where the centres are more than half a cell apart in its direction."""


@dataclass(frozen=True)
class Prompt:
    """A request, and what its drawing must show.

    ``shapes`` are (size or "", colour, form) of every shape; ``relation`` is (index, relation, index) or None.
    """

    text: str
    shapes: tuple[tuple[str, str, str], ...]
    relation: tuple[int, str, int] | None = None


def prompt(shapes: Scene, rng: np.random.Generator) -> Prompt:
    """A caption that names every shape of a scene, and at random a relation where there is one."""
    with_size = bool(rng.integers(2))
    wanted = tuple((shape.size if with_size else "", shape.color, shape.form) for shape in shapes)
    names = [f"a {' '.join(part for part in shape if part)}" for shape in wanted]
    holding = [
        (i, r, j)
        for r in RELATIONS
        for i in range(len(shapes))
        for j in range(len(shapes))
        if i != j and RELATIONS[r](shapes[i], shapes[j])
    ]
    if holding and rng.integers(3):
        i, relation, j = holding[int(rng.integers(len(holding)))]
        others = [name for n, name in enumerate(names) if n not in (i, j)]
        return Prompt(_joined([f"{names[i]} {relation} {names[j]}", *others]), wanted, (i, relation, j))
    return Prompt(_joined(names), wanted)


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def satisfies(image: np.ndarray, asked: Prompt) -> dict[str, bool]:
    """Judge a drawing: are the ``shapes`` there and no others, does the ``relation`` hold, and are ``all`` of these so?"""
    seen = see(image)
    chosen, left = [], list(seen)
    for size, color, form in asked.shapes:
        match = next((s for s in left if (s.color, s.form) == (color, form) and size in ("", s.size)), None)
        if match is not None:
            left.remove(match)
        chosen.append(match)
    there = None not in chosen and not left
    holds = True
    if asked.relation is not None:
        first, relation, second = chosen[asked.relation[0]], asked.relation[1], chosen[asked.relation[2]]
        holds = first is not None and second is not None and RELATIONS[relation](first, second)
    return {"shapes": there, "relation": holds, "all": there and holds}


def question(shapes: Scene, rng: np.random.Generator) -> tuple[str, str, tuple[str, ...], str]:
    """A question about a scene: its text, the answer, all answers of its kind, and the kind."""
    colors, yes_no = tuple(COLORS), ("yes", "no")
    kind = ("count", "color", "relation", "existence")[int(rng.integers(4))]
    forms = [shape.form for shape in shapes]
    if kind == "count":
        form = FORMS[int(rng.integers(len(FORMS)))] if rng.integers(2) else "shape"
        count = len(shapes) if form == "shape" else forms.count(form)
        return f"How many {form + ('es' if form == 'cross' else 's')} are there?", NUMBERS[count], NUMBERS, kind
    single = [shape for shape in shapes if forms.count(shape.form) == 1]
    if kind == "color" and single:
        shape = single[int(rng.integers(len(single)))]
        return f"What colour is the {shape.form}?", shape.color, colors, kind
    if kind == "relation" and len(shapes) > 1:
        first, second = (shapes[i] for i in rng.permutation(len(shapes))[:2])
        relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
        answer = yes_no[0] if RELATIONS[relation](first, second) else yes_no[1]
        return f"Is the {first.name} {relation} the {second.name}?", answer, yes_no, kind
    if rng.integers(2):
        name = shapes[int(rng.integers(len(shapes)))].name
    else:
        name = f"{list(COLORS)[int(rng.integers(len(COLORS)))]} {FORMS[int(rng.integers(len(FORMS)))]}"
    return f"Is there a {name}?", yes_no[0] if any(shape.name == name for shape in shapes) else yes_no[1], yes_no, "existence"


def record(seed: int, split: str, task: TaskName, number: int) -> tuple[Record, Scene]:
    """The sample of a number for a task."""
    # the two tasks have different scenes
    shapes = scene(seed, split, 2 * number + (task == "generation"))
    rng = stream(seed, Purpose.SYNTHETIC, 2 + SPLITS.index(split), number, int(task == "generation"))
    if task == "understanding":
        text, answer, choices, kind = question(shapes, rng)
        segments = (Segment(image="img0"), Segment(text=text), Segment(text=answer, loss=True))
        return Record(task=task, segments=segments, meta={"answer": answer, "choices": choices, "kind": kind, "split": split}), shapes
    asked = prompt(shapes, rng)
    meta = {"shapes": asked.shapes, "relation": asked.relation, "split": split}
    return Record(task=task, segments=(Segment(text=asked.text), Segment(image="img0", loss=True)), meta=meta), shapes


def write(folder: Path, pixels: int, num_train: int, num_test: int, *, seed: int = 0, samples_per_shard: int = 1000) -> dict[str, int]:
    """Write shards of both tasks and all splits with indexes, and the text model trained on the training text.

    Their names begin with task and split. Those for an image tokenizer are ``images-train-…``; they hold drawings with their requests.

    Args:
        folder: Folder to write to; made if it does not exist.
        pixels: Side of the images, 32 to 256.
        num_train: Training samples per task, and images for a tokenizer. A larger number begins with the same samples.
        num_test: Test samples per task and split.
        seed: Seed of the scenes.
        samples_per_shard: Samples in each shard but the last.

    Returns:
        Shard → number of its samples.
    """
    if not 32 <= pixels <= 256:
        raise MegavlmError(f"shapes cannot be drawn with {pixels} pixels\n  do:    choose 32 to 256")
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.glob("*.tar"), None):
        raise MegavlmError(f"{folder} already holds shards\n  do:    give another folder, or remove it first")
    written, texts = {}, []
    both: tuple[TaskName, ...] = ("understanding", "generation")
    parts: list[tuple[TaskName, str]] = [*((task, split) for split in ("train", "seen", "test") for task in both), ("generation", "images")]
    for task, split in parts:
        total = num_test if split in ("seen", "test") else num_train
        stem = "images-train" if split == "images" else f"{task}-{split}"
        for shard, first in enumerate(range(0, total, samples_per_shard)):
            path = folder / f"{stem}-{shard:04d}.tar"
            with TarWriter(str(path), encoder=False, mtime=0) as writer:
                for number in range(first, min(first + samples_per_shard, total)):
                    sample, shapes = record(seed, split, task, number)
                    if split == "train" and len(texts) < 20_000:
                        texts += [segment.text for segment in sample.segments if segment.text]
                    png = io.BytesIO()
                    Image.fromarray(render(shapes, pixels)).save(png, "PNG")
                    document = sample.model_dump_json(exclude_defaults=True).encode()
                    writer.write({"__key__": f"{split}-{number:08d}", "json": document, "img0.png": png.getvalue()})
            written[path.name] = write_index(path, "megavlm").samples
    train_text_model(texts, folder / "text.model", vocab_size=512)
    return written
