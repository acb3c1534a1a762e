"""Answers during training: what the model writes to questions of its own training data, beside what is right, as text in TensorBoard.

They come with the drawings, every ``monitor.sample_every_steps`` steps, and say how the model has learnt to speak; held-out figures come
from `megavlm evaluate`. Tested by `tests/observers/test_window.py`.
"""

from megavlm.analysis.subject import first_samples
from megavlm.data.pack.encode import EncodedSample
from megavlm.evaluation.sampling import answer
from megavlm.observers.drawings import is_sampling_due
from megavlm.routing.tasks import Task
from megavlm.training.observers import Observer, Training

NUM_QUESTIONS = 8
MAX_TOKENS = 32


class Answers(Observer):
    """All ranks answer, rank 0 writes."""

    name = "answer"

    def attach(self, training: Training) -> None:
        self.training = training
        self._samples: list[EncodedSample] | None = None

    def after_step(self, num_steps: int) -> None:
        training = self.training
        if not is_sampling_due(training.parts.config, num_steps):
            return
        if self._samples is None:
            found = [sample for pack in first_samples(training.parts, 4) for sample in pack]
            asked = [sample for sample in found if sample.task == Task.UNDERSTANDING and 0 < sample.first_label < sample.num_tokens]
            self._samples = asked[:NUM_QUESTIONS]
        if not self._samples:
            return
        training.engine.eval()
        try:
            answers = answer(
                training.engine,
                training.parts.encoder,
                [sample.prompt() for sample in self._samples],
                training.parts.inference_costing,
                device=training.world.device,
                max_tokens=MAX_TOKENS,
            )
        finally:
            training.engine.train()
        rows = [f"| {self._words(s, False)} | {self._words(s, True)} | {_cell(given)} |" for s, given in zip(self._samples, answers)]
        training.board.text("answers", "\n".join(["| question | right | answer |", "|---|---|---|", *rows]), num_steps)

    def _words(self, sample: EncodedSample, has_loss: bool) -> str:
        """The text of a sample's question, or of its answer."""
        vocabulary = self.training.parts.vocabulary
        ids = sample.tokens[vocabulary.is_text(sample.tokens) & (sample.has_loss == has_loss)]
        return _cell(vocabulary.decode_text(ids.tolist()))


def _cell(words: str) -> str:
    """Text in a cell of a table: nothing in it is Markdown."""
    return "`" + " ".join(words.replace("`", "'").replace("|", "/").split()) + "`" if words.strip() else ""
