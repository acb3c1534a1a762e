"""The run's vocabulary as a tokenizer that ``AutoTokenizer`` loads: text, special tokens and image codes at their ids.

A SentencePiece model is converted, and compared with the original on texts of every kind. What does not come out the same is not
written; ``AutoTokenizer`` then ends in an error instead of encoding something else.
"""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue] (protobuf makes it when imported)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from megavlm.system.files import write_atomically
from megavlm.vocabulary import TOKENIZER_FILE, HuggingFaceText, Vocabulary

NORMAL, USER_DEFINED, UNIGRAM = 1, 4, 1
"""Of SentencePiece: types of pieces, and the type of a model that weighs pieces against each other."""
APART = "\uf8fe"
"""A character that nobody uses."""
NUM_COMPARED = 2000
"""Texts of each kind."""


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> str:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Returns:
        A remark where the text model has no equal in `tokenizers`, so that nothing can be loaded; else nothing.
    """
    tokenizer = _text_tokenizer(vocabulary)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer is None:
        settings["tokenizer_class"] = "SeeVocabularyJson"
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=1))
        return "; no tokenizer for AutoTokenizer: the text model has no equal there, use text.model and vocabulary.json"
    names = token_names(vocabulary, tokenizer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    settings |= {"bos_token": tokenizer.id_to_token(vocabulary.bos), "eos_token": tokenizer.id_to_token(vocabulary.eos)}
    write_atomically(folder / TOKENIZER_FILE, tokenizer.to_str())
    write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=1))
    return ""


def token_names(vocabulary: Vocabulary, tokenizer: Tokenizer) -> list[str]:
    """What comes after the pieces of the text: special tokens, ``<code_00000>`` and so on, and rows that nothing uses."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    num_pieces = max(known.values()) + 1
    named = {i: name for name, i in vocabulary.specials.items()}
    named |= {vocabulary.first_code + code: f"<code_{code:05}>" for code in range(vocabulary.codebook_size)}
    names = [named.get(i, f"<unused_row_{i}>") for i in range(num_pieces, vocabulary.size)]
    # a pretrained tokenizer may have a <bos> of its own
    return [f"<megavlm_{name[1:]}" if name in known else name for name in names]


def _text_tokenizer(vocabulary: Vocabulary) -> Tokenizer | None:
    if isinstance(vocabulary.text, HuggingFaceText):
        tokenizer = Tokenizer.from_str(vocabulary.text.to_json())
        # ids are handed out in turn: there must be no gap among those of the text
        return tokenizer if tokenizer.get_vocab_size() == max(tokenizer.get_vocab().values()) + 1 else None
    proto = ModelProto()
    proto.ParseFromString(vocabulary.text_model.read_bytes())
    has_symbols = any(piece.type == USER_DEFINED for piece in proto.pieces)
    if proto.trainer_spec.model_type != UNIGRAM or not proto.trainer_spec.byte_fallback or has_symbols:
        return None
    tokenizer = from_sentencepiece(proto)
    pieces = [piece.piece for piece in proto.pieces]
    texts = texts_of_every_kind(pieces)
    is_same = all(tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.encode_text(text) for text in texts)
    return tokenizer if is_same else None


def from_sentencepiece(proto: ModelProto) -> Tokenizer:
    """The equal of a unigram model that falls back to bytes."""
    spec = proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=True))
    steps = []
    if spec.precompiled_charsmap:
        # of a letter with a mark that no single letter stands for, `tokenizers` would lose the mark: keep them apart for that step
        apart = normalizers.Replace(Regex(r"(?!\A)(?=\p{M})"), APART)
        steps = [apart, normalizers.Precompiled(spec.precompiled_charsmap), normalizers.Replace(APART, ""), normalizers.NFC()]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # "<0x41>" or "<unk>" in a text is text: cut after its first character, it is no piece any more
    others = [piece.piece for piece in proto.pieces if piece.type != NORMAL]
    cuts = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in others)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", int(spec.add_dummy_prefix), 0)]
    )
    return tokenizer


def texts_of_every_kind(pieces: list[str]) -> list[str]:
    """Texts of the model's pieces, of characters of all scripts, of spaces of all kinds, and of what looks like a special piece.

    Without letters that marks of their own stand beside in an unusual order: those SentencePiece leaves as they are.
    """
    rng = np.random.default_rng(0)
    letters = [
        chr(c)
        for c in (
            *range(32, 0x250),
            *range(0x300, 0x312),
            *range(0x370, 0x530),
            *range(0x3040, 0x3100),
            *range(0x4E00, 0x4F00),
            0x1F600,
            0x1F680,
        )
    ]
    spaces = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "▁", "<", ">", "<unk>", "<0x41>", "</s>", "a", "Z", "7", "."]
    words = [piece.replace("▁", " ") for piece in pieces]
    texts = ["", " ", "   ", "\n"]
    for alphabet in (letters, spaces, words, letters + spaces + words):
        texts += ["".join(rng.choice(alphabet, rng.integers(1, 24)).tolist()) for _ in range(NUM_COMPARED)]
    return [text for text in texts if unicodedata.normalize("NFKC", text) == "".join(unicodedata.normalize("NFKC", c) for c in text)]
