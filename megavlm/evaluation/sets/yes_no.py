"""Questions answered by yes or no, as in POPE (Li et al. 2023), which asks about objects that are or are not in an image.

{"image": "1.jpg", "text": "Is there a dog in the image?", "label": "no"}

Tested by `tests/evaluation/sets/test_reading_scores.py`.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field

from megavlm.evaluation.sets.entries import BadEntries, Item, read_entries


class YesNo(BaseModel):
    """One question."""

    image: str
    text: str = Field(validation_alias=AliasChoices("text", "question"))
    label: Literal["yes", "no"]
    group: str = Field("", validation_alias=AliasChoices("group", "category"))


def read_yes_no(path: Path, template: str, bad: BadEntries) -> list[Item]:
    """The questions of a set; ``template`` has ``{question}``."""
    return [
        Item(where, template.replace("{question}", entry.text), entry.label, entry.image, entry.group)
        for where, entry in read_entries(path, YesNo, bad)
    ]


def yes_or_no(answer: str) -> str:
    """The meaning of an answer: its first word that means yes or no (``not`` and ``isn't`` mean no), or ``unclear``."""
    for word in re.findall(r"[\w']+", answer.lower().replace("’", "'")):
        if word == "yes":
            return "yes"
        if word in ("no", "not") or word.endswith("n't"):
            return "no"
    return "unclear"


def figures(counts: Counter) -> dict[str, Any]:
    """Figures from counts of (label, said).

    ``yes`` is the positive class, as in POPE. An unclear answer is wrong, and is neither a yes nor a no. A quotient with a
    denominator of 0 is 0.
    """
    total = counts.total()
    true_yes, said_yes = counts["yes", "yes"], counts["yes", "yes"] + counts["no", "yes"]
    label_yes = sum(count for (label, _), count in counts.items() if label == "yes")
    precision, recall = true_yes / max(said_yes, 1), true_yes / max(label_yes, 1)
    return {
        "questions": total,
        "accuracy": (true_yes + counts["no", "no"]) / total,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes_ratio": said_yes / total,
        "unclear_answers": sum(count for (_, said), count in counts.items() if said == "unclear"),
    }


class YesNoScore:
    """Accuracy, precision, recall, F1 and share of yes, also by group."""

    def __init__(self):
        self._counts: dict[str, Counter] = defaultdict(Counter)

    def add(self, items: list[Item], answers: list[str]) -> list[dict[str, Any]]:
        """The meaning of each answer, and whether it is right."""
        said = [yes_or_no(answer) for answer in answers]
        for item, word in zip(items, said):
            self._counts[item.group][item.truth, word] += 1
        return [{"answer": a, "says": w, "right": w == item.truth} for item, a, w in zip(items, answers, said)]

    def result(self) -> dict[str, Any]:
        whole = sum(self._counts.values(), Counter())
        return figures(whole) | {"by_group": {group: figures(c) for group, c in sorted(self._counts.items()) if group}}
