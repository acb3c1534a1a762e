"""Many requests from a file: JSON lines in, pictures and an index of all answers and pictures out.

    {"question": "Which digit is this?", "image": "7.png"}          is answered
    {"prompt": "a handwritten seven"}                               is drawn
    {"prompt": "the same, but thinner", "images": ["7.png"]}        is drawn after the images

These are the words of the sets that `megavlm judge` reads; other keys are kept. OUT holds `index.jsonl`, a line per request with what was
asked and the answer or the names of the pictures; and the pictures, numbered as the requests.

Tested by `tests/talk/test_commands.py`.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, model_validator

from megavlm.errors import MegavlmError
from megavlm.evaluation.prompts import Part, check_length, to_draw, to_read
from megavlm.evaluation.sampling import answer
from megavlm.evaluation.sets.entries import BadEntries, read_entries
from megavlm.system.progress import progress
from megavlm.talk.talker import Talker
from megavlm.talk.words import read_picture

INDEX_FILE = "index.jsonl"


class Request(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="allow", frozen=True)

    question: str | None = None
    prompt: str | None = None
    image: str | None = None
    images: list[str] = []

    @model_validator(mode="after")
    def _one_thing(self) -> "Request":
        if (self.question is None) == (self.prompt is None):
            raise ValueError("a line has either question or prompt")
        if self.image and self.images:
            raise ValueError("a line has either image or images")
        return self

    @property
    def is_question(self) -> bool:
        return self.question is not None

    def parts(self, folder: Path) -> list[Part]:
        """Images, then the text. Raises MegavlmError for an image that cannot be used."""
        text = self.question if self.question is not None else self.prompt
        assert text is not None
        return [*(read_picture(folder / name) for name in self.images or ([self.image] if self.image else [])), text]


class Batch:
    """Answers and draws all requests of a file.

    Args:
        talker: The model.
        requests: The file.
        out: New folder.
        num: Drawings per prompt.
        max_tokens: Most tokens of an answer.
        batch_size: Requests at a time; another size gives other drawings.
        max_bad: Most lines that may be unusable.
    """

    def __init__(self, talker: Talker, requests: Path, out: Path, *, num: int, max_tokens: int, batch_size: int, max_bad: int):
        self.talker = talker
        self.out = out
        self.num = num
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.bad = BadEntries(requests, max_bad)
        self.requests = read_entries(requests, Request, self.bad)

    def run(self) -> str:
        """Write the folder; what was done, in words.

        Raises:
            MegavlmError: If the folder exists, or there is nothing to do.
        """
        if self.out.exists():
            raise MegavlmError(f"{self.out} exists already\n  do:    name another folder, or remove it")
        self.out.mkdir(parents=True)
        counts = {True: 0, False: 0}
        usable = self._usable(progress(self.requests, self.bad.file.name))
        with (self.out / INDEX_FILE).open("w", encoding="utf-8") as index:
            for is_question, alike in groupby(usable, key=lambda entry: entry.request.is_question):
                while entries := list(islice(alike, self.batch_size)):
                    for entry, result in zip(entries, (self._answer if is_question else self._draw)(entries)):
                        line = {"where": entry.where, "request": entry.request.model_dump(exclude_unset=True)} | result
                        index.write(json.dumps(line, ensure_ascii=False) + "\n")
                    index.flush()
                    counts[is_question] += len(entries)
        if not any(counts.values()):
            raise MegavlmError(f"{self.bad.file}: nothing could be asked or drawn\n  do:    read above why its lines were left out")
        return f"{self.out / INDEX_FILE}: {counts[True]} answers, {self.num * counts[False]} pictures; {len(self.bad.found)} lines left out"

    def _usable(self, requests: Iterable[tuple[str, Request]]) -> Iterator["Entry"]:
        encoder, longest = self.talker.model.encoder, self.talker.longest
        for number, (where, request) in enumerate(requests, 1):
            try:
                parts = request.parts(self.bad.file.parent)
                if request.is_question:
                    check_length(to_read(encoder, parts), longest - self.max_tokens)
                else:
                    check_length(to_draw(encoder, parts), longest)
            except MegavlmError as error:
                self.bad.add(where, str(error).split("\n")[0])
            else:
                yield Entry(number, where, request, parts)

    def _answer(self, entries: list["Entry"]) -> list[dict[str, Any]]:
        model = self.talker.model
        prompts = [to_read(model.encoder, entry.parts, number) for number, entry in enumerate(entries)]
        answers = answer(model.backbone, model.encoder, prompts, model.costing, device=model.device, max_tokens=self.max_tokens)
        return [{"answer": text} for text in answers]

    def _draw(self, entries: list["Entry"]) -> list[dict[str, Any]]:
        model = self.talker.model
        repeated = [entry.parts for entry in entries for _ in range(self.num)]
        pictures = iter(model.image_tokenizer.decode(model.draw(repeated, entries[0].number)))
        results = []
        for entry in entries:
            names = [f"{entry.number:06}-{i}.png" for i in range(self.num)]
            for name, picture in zip(names, pictures):
                Image.fromarray(picture).save(self.out / name)
            results.append({"pictures": names})
        return results


class Entry(NamedTuple):
    """A usable request."""

    number: int
    """Its place among the requests, from 1."""
    where: str
    request: Request
    parts: list[Part]
