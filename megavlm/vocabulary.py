"""One id space for everything the model reads and writes: ``text | special | image codes``.

    0 … num_text-1                 text: pieces of a SentencePiece model, or the rows of a pretrained model's embedding
    num_text … +len(SPECIALS)-1    <bos> <eos> <boi> <eoi> <unconditional>
    the rest                       the image tokenizer's codebook

The text of a pretrained backbone keeps its ids. Its rows may be more than its tokenizer has pieces (they are padded for speed): they are
counted as its ``config.json`` says. A model that draws already keeps all of its ids (`TrainedIds`).
"""

import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from megavlm.errors import ConfigError, MegavlmError
from megavlm.image_tokenizers.build import ImageTokenizerConfig
from megavlm.image_tokenizers.pixel import PixelTokenizerConfig
from megavlm.settings import PathText, Positive, Settings
from megavlm.system.files import copy_atomically, write_atomically

log = logging.getLogger(__name__)


class TrainedIds(Settings):
    """The ids of a pretrained model that reads and draws image codes already, such as Liquid: its tokenizer has special tokens for images
    among the text, and codes follow each other in its embedding."""

    first_code: Positive
    """Id of image code 0."""
    bos: str = "<bos>"
    """Name that the tokenizer has for the beginning of a sample."""
    eos: str = "<eos>"
    """Its name for the end."""
    boi: str = "<boi>"
    """Its name for the beginning of an image."""
    eoi: str = "<eoi>"
    """Its name for the end of an image."""
    unconditional: str = "<unconditional>"
    """Its name for what stands in place of a prompt, for guidance."""


class VocabularyConfig(Settings):
    """What ids mean: text pieces, special tokens, image codes."""

    text_model: PathText
    """Path of a SentencePiece model, or of a Hugging Face folder with `tokenizer.json`; a copy is kept in the run folder."""
    image_tokenizer: ImageTokenizerConfig = PixelTokenizerConfig()
    """How images become codes."""
    trained_ids: TrainedIds | None = None
    """Where special tokens and codes lie in a model that draws already; `null` puts new rows for them behind the text's."""


SPECIALS = ("<bos>", "<eos>", "<boi>", "<eoi>", "<unconditional>")


class TextTokenizer(Protocol):
    """Texts to ids and back."""

    num_text: int
    """Ids are smaller than this."""

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens; nothing that stands in the text becomes one."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text; special tokens are left out."""
        ...


class SentencePieceText:
    """A SentencePiece model.

    Args:
        path: The ``.model`` file.
    """

    def __init__(self, path: Path):
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.num_text = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceText:
    """The tokenizer of a pretrained model, from ``tokenizer.json`` alone: nothing is downloaded, no code of the folder runs.

    Args:
        folder: Of the pretrained model; without ``config.json`` the ids are counted.
    """

    def __init__(self, folder: Path):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        # "<|im_end|>" in a caption is text
        self._tokenizer.encode_special_tokens = True
        # what the file says of other uses: a text is neither cut, filled up, framed nor cut differently every time
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = None
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None
        num_pieces = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.num_text = num_pieces
        if (folder / "config.json").is_file():
            tree = json.loads((folder / "config.json").read_text())
            self.num_text = tree.get("text_config", tree).get("vocab_size", num_pieces)
        if self.num_text < num_pieces:
            raise ConfigError(
                f"vocabulary.text_model: {folder} has {num_pieces} pieces, but its config.json says vocab_size {self.num_text}\n"
                "  do:    use the tokenizer that belongs to the model"
            )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def id_of(self, name: str) -> int:
        """The id of a token.

        Raises:
            ConfigError: If there is none of this name.
        """
        found = self._tokenizer.token_to_id(name)
        if found is None:
            raise ConfigError(
                f"vocabulary.trained_ids: the tokenizer has no token {name!r}\n  do:    give the name that the model was trained with"
            )
        return found

    def to_json(self) -> str:
        """As the contents of a ``tokenizer.json``."""
        return self._tokenizer.to_str()


TOKENIZER_FILE = "tokenizer.json"


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer of a SentencePiece file or a Hugging Face folder.

    Raises:
        ConfigError: If there is none.
    """
    path = Path(path)
    try:
        if (path / TOKENIZER_FILE).is_file():
            return HuggingFaceText(path)
        if path.is_file():
            return SentencePieceText(path)
    except ConfigError:
        raise
    except Exception as error:  # sentencepiece and tokenizers raise what they like
        raise ConfigError(
            f"vocabulary.text_model: {path} is damaged or no tokenizer: {str(error)[:200]}\n"
            "  do:    bring it back from a copy, or name another"
        ) from error
    raise ConfigError(
        f"vocabulary.text_model: no SentencePiece model at {path}, and no folder with {TOKENIZER_FILE}\n"
        f"  do:    write the benchmark's data (`megavlm data digits {path.parent}`), or correct the path"
    )


def copy_text_model(source: Path, target: Path) -> None:
    """Copy what `load_text_tokenizer` reads: a file, or of a folder the tokenizer and the configuration."""
    if source.is_file():
        copy_atomically(source, target)
        return
    target.mkdir(exist_ok=True)
    for name in ("config.json", TOKENIZER_FILE):  # a folder without the latter is none
        if (source / name).is_file():
            copy_atomically(source / name, target / name)


def same_text_model(first: Path, second: Path) -> bool:
    """Whether two Hugging Face folders have the same tokenizer."""
    files = [path / TOKENIZER_FILE for path in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


class Vocabulary:
    """Text pieces, special tokens and image codes with their ids.

    Args:
        text_model: Path of a SentencePiece model, or of a Hugging Face folder.
        codebook_size: Number of codes of the image tokenizer.
        trained_ids: Of a model that draws already.

    Raises:
        ConfigError: If there is no text model, or it has no such ids.
    """

    def __init__(self, text_model: str | Path, codebook_size: int, trained_ids: TrainedIds | None = None):
        self.text_model = Path(text_model)
        self.text = load_text_tokenizer(text_model)
        self.codebook_size = codebook_size
        num_rows = self.text.num_text
        self.num_text = num_rows if trained_ids is None else trained_ids.first_code
        """Text lies below, and special tokens of a model that draws already."""
        self.specials = _new_ids(num_rows) if trained_ids is None else _known_ids(self.text, trained_ids)
        """Names of `SPECIALS` and their ids."""
        self.bos, self.eos, self.boi, self.eoi, self.unconditional = self.specials.values()
        self.first_code = num_rows + len(SPECIALS) if trained_ids is None else trained_ids.first_code
        self.end_code = self.first_code + codebook_size
        """One above the last code."""
        self.size = max(num_rows, self.end_code)

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Which of some ids are text."""
        return (ids < self.num_text) & ~np.isin(ids, list(self.specials.values()))

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.text.encode(text)

    def decode_text(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and image codes are left out."""
        ids = np.fromiter(ids, np.int64)
        return self.text.decode(ids[self.is_text(ids)].tolist())

    def encode_image(self, codes_hw: np.ndarray) -> np.ndarray:
        """Codebook indices ``[h, w]`` to token ids ``[1 + h*w + 1]``: ``<boi>``, the codes in raster order, ``<eoi>``."""
        ids = np.empty(codes_hw.size + 2, np.int64)
        ids[0], ids[-1] = self.boi, self.eoi
        np.add(codes_hw.reshape(-1), self.first_code, out=ids[1:-1])
        return ids

    def decode_codes(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of image codes, of any shape, to codebook indices."""
        return np.asarray(ids) - self.first_code


def _new_ids(num_rows: int) -> dict[str, int]:
    return {name: num_rows + i for i, name in enumerate(SPECIALS)}


def _known_ids(text: TextTokenizer, trained: TrainedIds) -> dict[str, int]:
    """The ids of special tokens that a tokenizer has already."""
    if not isinstance(text, HuggingFaceText):
        raise ConfigError(
            "vocabulary.trained_ids: vocabulary.text_model is no Hugging Face folder\n"
            "  do:    give that of the model, or leave trained_ids out"
        )
    if trained.first_code > text.num_text:
        raise ConfigError(
            f"vocabulary.trained_ids: first_code ({trained.first_code}) lies behind the model's {text.num_text} rows\n"
            "  do:    give the id that image code 0 has in the model's embedding"
        )
    named = {name: getattr(trained, name.strip("<>")) for name in SPECIALS}
    ids = {name: text.id_of(of_model) for name, of_model in named.items()}
    if above := [named[name] for name, i in ids.items() if i >= trained.first_code]:
        raise ConfigError(
            f"vocabulary.trained_ids: {', '.join(above)} lies at first_code ({trained.first_code}) or above\n"
            "  do:    give the id that image code 0 has in the model's embedding"
        )
    return ids


SENTENCE_BYTES = 4192
"""SentencePiece leaves out longer texts without a word,"""
UNSPEAKABLE = str.maketrans("\N{LOWER FIVE EIGHTHS BLOCK}\0", "  ")
"""and those with these characters."""


class TextCounts:
    """What became of the texts that a model was trained on."""

    def __init__(self):
        self.texts = 0
        """Texts that were used."""
        self.empty = 0
        """Texts without a character that shows."""
        self.divided = 0
        """Those of ``texts`` that were longer than SentencePiece takes, and were given to it in parts."""


def train_text_model(texts: Iterable[str], path: Path, vocab_size: int) -> TextCounts:
    """Train a SentencePiece model (unigram, bytes for characters never seen) and write it to ``path``.

    Args:
        texts: The training text, one entry per text segment.
        path: Where to write the ``.model`` file.
        vocab_size: Upper bound; a small corpus gives a smaller vocabulary. At least 256 bytes plus its characters.

    Returns:
        What became of the texts.

    Raises:
        ConfigError: Where there is no text, or too few pieces for its characters.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model, counts, mistakes = io.BytesIO(), TextCounts(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, counts, mistakes),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"no text model can be trained on these texts: {error}\n  do:    give more text, or another vocab_size"
        ) from error
    finally:
        if mistakes:
            raise mistakes[0]
    # a model that is there already stays until there is another
    write_atomically(path, model.getvalue())
    return counts


def _sentences(texts: Iterable[str], counts: TextCounts, mistakes: list[MegavlmError]) -> Iterator[str]:
    """The texts in parts that SentencePiece takes. It would hide what reading them raises: that goes into ``mistakes``."""
    try:
        for text in texts:
            if not text.strip():
                counts.empty += 1
                continue
            counts.texts += 1
            counts.divided += len(text.encode("utf-8", "surrogatepass")) > SENTENCE_BYTES
            yield from _parts(text.translate(UNSPEAKABLE))
        log.info("%d texts are read; the pieces are made from them", counts.texts)
    except MegavlmError as error:
        mistakes.append(error)


def _parts(text: str) -> Iterator[str]:
    """A text cut at blanks, or anywhere where there are none, into parts of at most `SENTENCE_BYTES`."""
    if len(text.encode("utf-8", "surrogatepass")) <= SENTENCE_BYTES:
        yield text
        return
    begin, most = 0, SENTENCE_BYTES // 4  # a character has at most four bytes
    while begin < len(text):
        end = text.rfind(" ", begin + 1, begin + most) if len(text) - begin > most else len(text)
        end = end if end > begin else begin + most
        yield text[begin:end]
        begin = end
