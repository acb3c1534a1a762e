"""One id space for everything the model reads and writes: ``text | special | image codes``.

    0 … num_text-1                 pieces of the SentencePiece model
    num_text … +len(SPECIALS)-1    <bos> <eos> <boi> <eoi> <unconditional>
    the rest                       the image tokenizer's codebook
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from megavlm.errors import ConfigError

SPECIALS = ("<bos>", "<eos>", "<boi>", "<eoi>", "<unconditional>")


class Vocabulary:
    """Text pieces, special tokens and image codes with their ids.

    Args:
        text_model: Path of a SentencePiece model.
        codebook_size: Number of codes of the image tokenizer.
    """

    def __init__(self, text_model: str | Path, codebook_size: int):
        if not Path(text_model).is_file():
            raise ConfigError(
                f"vocabulary.text_model: no SentencePiece model at {text_model}\n"
                f"  do:    write the benchmark's data (`megavlm data digits {Path(text_model).parent}`) or correct the path"
            )
        self.text = sentencepiece.SentencePieceProcessor(model_file=str(text_model))
        self.num_text = self.text.vocab_size()
        self.codebook_size = codebook_size
        self.bos, self.eos, self.boi, self.eoi, self.unconditional = (
            self.num_text + i for i in range(len(SPECIALS))
        )
        self.first_code = self.num_text + len(SPECIALS)
        self.size = self.first_code + codebook_size

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.text.encode(text)

    def decode_text(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and image codes are left out."""
        return self.text.decode([int(i) for i in ids if i < self.num_text])

    def encode_codes(self, codes_hw: np.ndarray) -> np.ndarray:
        """Codebook indices ``[h, w]`` to token ids ``[h*w]`` in raster order."""
        return codes_hw.reshape(-1).astype(np.int64) + self.first_code

    def decode_codes(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of image codes, of any shape, to codebook indices."""
        return np.asarray(ids) - self.first_code


def train_text_model(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Train a SentencePiece model (unigram, bytes for characters never seen) and write it to ``path``.

    Args:
        texts: The training text, one entry per text segment.
        path: Where to write the ``.model`` file.
        vocab_size: Upper bound; a small corpus gives a smaller vocabulary. At least 256 bytes plus its characters.
    """
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
