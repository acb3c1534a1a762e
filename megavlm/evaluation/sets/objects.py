"""Are the requested objects in a drawing? GenEval's checks (Ghosh et al. 2023) with a detector of the user's.

    {"tag": "position", "prompt": "a red dog left of two cats",
     "include": [{"class": "cat", "count": 2}, {"class": "dog", "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "cat", "count": 3}]}

The position of an object is relative to the object with that number, an earlier one. The detector is a function. It takes an image, uint8
RGB ``[H, W, 3]``, and returns a list of ``{"class", "box": [x0, y0, x1, y1], "score", "color"}``; the colour is optional.

Letters: N images, H and W pixels, C colours. Tested by `tests/evaluation/sets/test_drawing_scores.py`.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from megavlm.errors import MegavlmError
from megavlm.evaluation.sets.entries import BadEntries, Item, read_entries

Direction = Literal["left of", "right of", "above", "below"]
GAP = 0.1
"""Least distance in a direction, as a share of the sum of the two widths (heights)."""


class Wanted(BaseModel):
    """An object that the drawing must have."""

    model_config = ConfigDict(populate_by_name=True)

    kind: str = Field(alias="class")
    count: int = Field(1, ge=1)
    color: str | None = None
    position: tuple[Direction, int] | None = None


class Unwanted(BaseModel):
    """An object that the drawing must have fewer than ``count`` of."""

    model_config = ConfigDict(populate_by_name=True)

    kind: str = Field(alias="class")
    count: int = Field(1, ge=1)


class Request(BaseModel):
    """A prompt, and what its drawing must show."""

    prompt: str
    include: list[Wanted] = Field(min_length=1)
    exclude: list[Unwanted] = []
    tag: str = "untagged"

    @model_validator(mode="after")
    def _positions_look_back(self) -> "Request":
        for number, wanted in enumerate(self.include):
            if wanted.position and not 0 <= wanted.position[1] < number:
                raise ValueError(f"include.{number}: position names number {wanted.position[1]}, which is no earlier object")
        return self


class Detection(BaseModel):
    """An object that the detector found; the box is in pixels."""

    model_config = ConfigDict(populate_by_name=True)

    kind: str = Field(alias="class")
    box: tuple[float, float, float, float]
    score: float = 1.0
    color: str | None = None


def read_requests(path: Path, bad: BadEntries) -> list[Item]:
    """The prompts of a set, each with its `Request`."""
    return [Item(where, request.prompt, request, group=request.tag) for where, request in read_entries(path, Request, bad)]


def directions(a: Detection, b: Detection) -> set[str]:
    """The directions in which ``a`` lies, seen from ``b``.

    The offset of the centres is shortened per axis by `GAP` times the sum of the two sizes. A direction counts if the shortened offset
    there is more than half of the whole offset.
    """
    offset, left = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        sizes = a.box[high] - a.box[low] + b.box[high] - b.box[low]
        offset.append(distance)
        left.append(math.copysign(max(abs(distance) - GAP * sizes, 0), distance))
    length = math.hypot(*offset)
    if length == 0:
        return set()
    x, y = left[0] / length, left[1] / length
    return {name for name, share in (("left of", -x), ("right of", x), ("above", -y), ("below", y)) if share > 0.5}


def mistakes(found: list[Detection], request: Request) -> list[str]:
    """The mistakes of a drawing, in words; empty if it is right.

    For a requested class, the ``count`` most certain objects are checked. All of them must have the colour, and the position relative
    to each of the objects that they are placed by.
    """
    by_kind, groups, wrong = defaultdict(list), [], []
    for detection in sorted(found, key=lambda detection: -detection.score):
        by_kind[detection.kind].append(detection)
    for wanted in request.include:
        objects = by_kind[wanted.kind][: wanted.count]
        groups.append(objects)
        if len(objects) < wanted.count:
            wrong.append(f"{len(objects)} of {wanted.count} {wanted.kind}")
            continue
        if wanted.color and (others := [o.color for o in objects if o.color != wanted.color]):
            wrong.append(f"{wanted.kind} is {others[0] or 'of no known colour'}, not {wanted.color}")
        if wanted.position:
            direction, number = wanted.position
            if not groups[number] or not all(direction in directions(o, other) for o in objects for other in groups[number]):
                wrong.append(f"{wanted.kind} is not {direction} {request.include[number].kind}")
    for unwanted in request.exclude:
        if len(by_kind[unwanted.kind]) >= unwanted.count:
            wrong.append(f"{len(by_kind[unwanted.kind])} {unwanted.kind}, wanted fewer than {unwanted.count}")
    return wrong


class ObjectScore:
    """Share of the drawings that are right, per tag, and the mean over tags as GenEval's overall score.

    Args:
        detect: The detector.
        min_score: Detections with a lower score are left out.
        min_score_counting: The same for the tag ``counting``, where a doubtful object counts as one too many.
    """

    _detections = TypeAdapter(list[Detection])

    def __init__(self, detect: Callable[[np.ndarray], list[dict]], min_score: float = 0.3, min_score_counting: float = 0.9):
        self.detect = detect
        self.min_score = min_score
        self.min_score_counting = min_score_counting
        self._right: dict[str, list[bool]] = defaultdict(list)

    def add(self, items: list[Item], images_NHWC: np.ndarray) -> list[dict[str, Any]]:
        """The mistakes of each drawing.

        Raises:
            MegavlmError: If the detector returns anything but detections.
        """
        verdicts = []
        for item, image in zip(items, images_NHWC):
            try:
                found = self._detections.validate_python(self.detect(image))
            except ValidationError as error:
                raise MegavlmError(
                    f"the detector gave something else than a list of class, box, score and color: {error.errors()[0]['msg']} at"
                    f" {error.errors()[0]['loc']}\n  do:    see `megavlm.evaluation.sets.objects`"
                ) from error
            least = self.min_score_counting if item.group == "counting" else self.min_score
            wrong = mistakes([detection for detection in found if detection.score >= least], item.truth)
            self._right[item.group].append(not wrong)
            verdicts.append({"right": not wrong, "mistakes": wrong})
        return verdicts

    def result(self) -> dict[str, Any]:
        by_tag = {tag: {"drawings": len(right), "accuracy": sum(right) / len(right)} for tag, right in sorted(self._right.items())}
        every = [right for values in self._right.values() for right in values]
        overall = sum(figures["accuracy"] for figures in by_tag.values()) / len(by_tag)
        return {"overall": overall, "accuracy_of_all_drawings": sum(every) / len(every), "by_tag": by_tag}
