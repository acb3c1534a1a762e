"""The driver between a set, a trained model and a scorer.

It writes into the run folder, under the kind and the file's name::

    judged/vqa-val.json       figures, settings, counts, and every entry that could not be used
    judged/vqa-val.jsonl      every answer, or the verdict on every drawing, as they come
    judged/geneval-x.png      the first drawings
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megavlm.data.pack.encode import EncodedSample
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.errors import DataError, MegavlmError
from megavlm.evaluation.sampling import answer
from megavlm.evaluation.sets.entries import BadEntries, Item, read_image
from megavlm.evaluation.trained import TrainedModel
from megavlm.system.files import write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.pictures import save_grid
from megavlm.system.progress import progress

NUM_SHOWN = 40


class Score(Protocol):
    """Turns answers or drawings into figures."""

    def add(self, items: list[Item], outputs: Any, /) -> list[dict[str, Any]]:
        """Take a batch of answers (texts) or drawings (uint8 ``[N, H, W, 3]``); a verdict on each, as JSON."""
        ...

    def result(self) -> dict[str, Any]:
        """The figures of everything that was added."""
        ...


class Judge:
    """One set judged with one model.

    Args:
        model: The model.
        kind: Kind of the set; part of the names of the written files.
        bad: Counts unusable entries, those found by the reader included.
        batch_size: Questions or drawings at a time.
        options: Options of the command, to note in the result.
    """

    def __init__(self, model: TrainedModel, kind: str, bad: BadEntries, batch_size: int, *, options: dict[str, Any]):
        self.model = model
        self.kind = kind
        self.bad = bad
        self.batch_size = batch_size
        self.options = options
        self.stem = model.folder.path / "judged" / f"{kind}-{bad.file.stem}"

    def read(self, items: list[Item], images: Path, max_tokens: int, score: Score) -> dict[str, Any]:
        """Ask the model about images in the folder ``images``. Answers are greedy, with at most ``max_tokens`` tokens."""
        model = self.model

        def respond(batch: list[tuple[Item, EncodedSample]]):
            prompts = [prompt for _, prompt in batch]
            where = {"device": model.device, "batch_tokens": model.config.batch_tokens}
            return answer(model.backbone, model.encoder, prompts, model.costing, max_tokens=max_tokens, **where)

        return self._run(self._with_images(items, images), respond, score)

    def draw(self, items: list[Item], num_per_prompt: int, score: Score) -> dict[str, Any]:
        """Draw every prompt ``num`` times, as the recipe's ``evaluation`` says. The seed of a batch follows from its place."""
        model = self.model
        shown: list[tuple[str, np.ndarray]] = []
        num_drawn = 0

        def respond(batch: list[tuple[Item, None]]) -> np.ndarray:
            nonlocal num_drawn
            prompts = [item.prompt for item, _ in batch]
            images = model.image_tokenizer.decode(model.draw(prompts, num_drawn))
            shown.extend(zip(prompts[: NUM_SHOWN - len(shown)], images))
            num_drawn += len(batch)
            return images

        repeated = [(item, None) for item in items for _ in range(num_per_prompt)]
        told = progress(repeated, f"{self.kind} {self.bad.file.name}")
        options = {"drawings_per_prompt": num_per_prompt} | model.config.model_dump(include={"temperature", "top_k", "guidance"})
        result = self._run(told, respond, score, options)
        picture = self.stem.with_name(f"{self.stem.name}.png")
        with harmless(f"the picture {picture}"):
            save_grid([image for _, image in shown], [caption for caption, _ in shown], picture, columns=8)
        return result

    def _with_images(self, items: list[Item], images: Path) -> Iterator[tuple[Item, EncodedSample]]:
        """Items with their prompts for the model; those whose image cannot be used are counted as bad."""
        for number, item in enumerate(progress(items, f"{self.kind} {self.bad.file.name}")):
            # a stand-in for the model's answer; prompt() removes it
            segments = (Segment(image="image"), Segment(text=item.prompt), Segment(text="?", loss=True))
            try:
                image = {"image": read_image(images / item.image)}
                sample = Sample(item.where, "understanding", segments, image, Coordinates(0, 0, 0, number))
                yield item, self.model.encoder(sample).prompt()
            except DataError as error:
                self.bad.add(item.where, error.what)

    def _run(self, pairs, respond: Callable, score: Score, options: dict[str, Any] | None = None) -> dict[str, Any]:
        self.stem.parent.mkdir(exist_ok=True)
        pairs, num_judged = iter(pairs), 0
        with self.stem.with_name(f"{self.stem.name}.jsonl").open("w", encoding="utf-8") as lines:
            while batch := list(islice(pairs, self.batch_size)):
                items = [item for item, _ in batch]
                for item, verdict in zip(items, score.add(items, respond(batch))):
                    line = {"where": item.where, "image": item.image or None, "prompt": item.prompt} | verdict
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines.flush()
                num_judged += len(batch)
        if not num_judged:
            raise MegavlmError(f"{self.bad.file}: nothing could be judged\n  do:    read above why its entries were left out")
        result = {
            "kind": self.kind,
            "set": str(self.bad.file),
            "checkpoint": self.model.checkpoint.name,
            "route": self.model.config.route,
            "judged": num_judged,
            "bad": len(self.bad.found),
            "figures": score.result(),
            "settings": {"batch_size": self.batch_size} | self.options | (options or {}),
            "bad_entries": self.bad.found,
        }
        write_atomically(self.stem.with_name(f"{self.stem.name}.json"), json.dumps(result, indent=1, ensure_ascii=False))
        return result
