"""Questions with short answers: VQA's pair of files, or plain lists of questions as in GQA.

{"questions": [{"question_id", "image_id", "question"}]} with {"annotations": [{"question_id", "answers": [{"answer"} x 10]}]}
{"image": "1.jpg", "question": "What is it?", "answer": "a dog"}                         a list of these, or lines
{"image": "1.jpg", "question": "What is it?", "answers": ["dog", "puppy"], "group": "what"}
{"2064": {"imageId": "2370799", "question": "Is it red?", "answer": "no"}}               GQA's own form

Tested by `tests/evaluation/sets/test_reading_scores.py`.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, model_validator

from megavlm.errors import MegavlmError
from megavlm.evaluation.sets.entries import BadEntries, Item, load_json, parse_entries, read_entries

ARTICLES = {"a", "an", "the"}
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTIONS = {
    f"{stem}t": f"{stem}'t"
    for stem in "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn shouldn wasn weren won wouldn".split()
} | {
    word.replace("'", ""): word
    for word in "i'm i've you're you've he's she's that's there's they're they've we've what's where's who's could've should've".split()
}
NUM_ANNOTATORS = 10
"""People who answered each question of VQA; the score is defined on them."""


class Question(BaseModel):
    """One question with its right answer or answers."""

    image: str | int = Field(validation_alias=AliasChoices("image", "imageId", "image_id"))
    question: str = Field(validation_alias=AliasChoices("question", "text"))
    answers: list[str] = Field(min_length=1)
    group: str = Field("", validation_alias=AliasChoices("group", "answer_type"))

    @model_validator(mode="before")
    @classmethod
    def _one_answer_is_a_list_too(cls, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        answers = entry["answers"] if isinstance(entry.get("answers"), list) else [entry[k] for k in ("answer",) if k in entry]
        return entry | {"answers": [a["answer"] if isinstance(a, dict) and "answer" in a else a for a in answers]}


def read_questions(path: Path, annotations: Path | None, image_name: str, template: str, *, bad: BadEntries) -> list[Item]:
    """The questions of a set.

    Args:
        path: Questions, with their answers unless ``annotations`` has them.
        annotations: VQA's file of annotations.
        image_name: Pattern that makes a file name of the image's id or name: ``COCO_val2014_{:012d}.jpg``. Empty takes the name itself or,
            for VQA, COCO's own pattern.
        template: The prompt, with ``{question}``.
        bad: Counts unusable entries.
    """
    if annotations is None:
        entries = read_entries(path, Question, bad)
    else:
        entries, image_name = _with_annotations(path, annotations, image_name, bad)
    items = []
    for where, entry in entries:
        try:
            image = (image_name or "{}").format(entry.image)
        except (ValueError, IndexError, KeyError) as error:
            bad.add(where, f"image {entry.image!r} does not fit --image_name {image_name!r}: {error}")
            continue
        items.append(Item(where, template.replace("{question}", entry.question), entry.answers, image, entry.group))
    return items


def _with_annotations(path: Path, annotations: Path, image_name: str, bad: BadEntries):
    asked, answered = load_json(path), load_json(annotations)
    for file, document, key in ((path, asked, "questions"), (annotations, answered, "annotations")):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise MegavlmError(f"{file} has no list {key!r}\n  do:    give VQA's files, or one plain list without --annotations")
    by_id = {entry.get("question_id"): entry for entry in answered["annotations"] if isinstance(entry, dict)}
    named = []
    for number, question in enumerate(asked["questions"], 1):
        name = question.get("question_id") if isinstance(question, dict) else None
        if name in by_id and name is not None:
            named.append((f"question {name}", by_id[name] | question))
        else:
            bad.add(f"question {name or f'number {number}'}", "has no annotation")
    return parse_entries(named, Question, bad), image_name or f"COCO_{asked.get('data_subtype', 'val2014')}_{{:012d}}.jpg"


def normalise(answer: str) -> str:
    """An answer as VQA compares it (Antol et al. 2015; visualqa.org/evaluation).

    Lower case. Periods are removed unless they are decimal points; commas between digits and articles are removed. Other punctuation
    becomes a space, except apostrophe and colon. Number words up to ten become digits (``none`` is 0). Contractions get their
    apostrophe.
    """
    text = answer.lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s'.:]|_", " ", text)
    words = (CONTRACTIONS.get(word, NUMBERS.get(word, word)) for word in text.split() if word not in ARTICLES)
    return " ".join(words)


def vqa_score(given: str, answers: list[str]) -> float:
    """min(number of agreeing people / 3, 1), averaged over the ten sets of nine people (Antol et al. 2015).

    One agreeing person gives 0.3, two give 0.6, three 0.9, four or more 1.
    """
    agrees = [normalise(answer) == normalise(given) for answer in answers]
    return sum(min((sum(agrees) - left_out) / 3, 1) for left_out in agrees) / len(agrees)


def exact_match(given: str, answers: list[str]) -> bool:
    """Whether an answer, normalised, is one of the most frequent right ones."""
    counts = Counter(normalise(answer) for answer in answers)
    return counts[normalise(given)] == max(counts.values())


class VqaScore:
    """Exact match over all questions, VQA score over those that ten people answered, both also by group."""

    def __init__(self):
        self._exact: dict[str, list[float]] = defaultdict(list)
        self._soft: dict[str, list[float]] = defaultdict(list)

    def add(self, items: list[Item], answers: list[str]) -> list[dict[str, Any]]:
        """The scores of each answer."""
        verdicts = []
        for item, given in zip(items, answers):
            verdict = {"answer": given, "exact_match": exact_match(given, item.truth)}
            self._exact[item.group].append(verdict["exact_match"])
            if len(item.truth) == NUM_ANNOTATORS:
                verdict["vqa_score"] = vqa_score(given, item.truth)
                self._soft[item.group].append(verdict["vqa_score"])
            verdicts.append(verdict)
        return verdicts

    def result(self) -> dict[str, Any]:
        """Means; ``vqa_score`` is None where no question has ten answers."""
        soft = [value for values in self._soft.values() for value in values]
        groups = {
            group: {"questions": len(values)} | _means(values, self._soft.get(group, []))
            for group, values in sorted(self._exact.items())
            if group
        }
        exact = [value for values in self._exact.values() for value in values]
        return _means(exact, soft) | {"questions_with_ten_answers": len(soft), "by_group": groups}


def _means(exact: list[float], soft: list[float]) -> dict[str, float | None]:
    return {"exact_match": sum(exact) / len(exact), "vqa_score": sum(soft) / len(soft) if soft else None}
