"""Samples longer than a pack, by policy. Every one of them is counted; see `OverLong` for what happens to it.

Texts are cut as tokens, never encoded again, so what is cut is a beginning of the text and as long as it was meant to be.
"""

from dataclasses import replace

from megavlm.data.pack.config import OverLong
from megavlm.data.pack.encode import EncodedSample, Encoder, Ids, Run, num_tokens
from megavlm.data.read.sample import Sample
from megavlm.errors import DataError
from megavlm.vocabulary import Vocabulary

BYTES_OF_A_CHARACTER = 4
"""At most so many tokens are one character."""
BLANK = " \t\r\n\N{REPLACEMENT CHARACTER}"
"""What tokens decode to that show nothing: white space, or parts of a character."""


def encode_within(sample: Sample, encoder: Encoder, max_tokens: int, policy: OverLong) -> tuple[list[EncodedSample], str | None]:
    """Encode a sample into samples of at most ``max_tokens`` tokens.

    Returns:
        The encoded samples, each with a label in a segment, and how the policy acted: None, ``skipped``, ``truncated`` or ``split``.

    Raises:
        DataError: Without a place, under the policy `error`, where the policy cannot make the sample fit, or where it has no label.
    """
    runs = encoder.runs(sample)
    if not _teaches(runs):
        raise DataError("the sample has nothing to learn: what has a loss is empty", "correct or remove the sample")
    if (length := num_tokens(runs)) <= max_tokens:
        return [encoder.join(sample, runs)], None
    if policy == "skip":
        return [], "skipped"
    if policy == "truncate_text" and (shorter := _truncated(runs, encoder.vocabulary, length - max_tokens)):
        return [encoder.join(sample, shorter)], "truncated"
    if policy == "split_images" and (pieces := _split(runs, max_tokens)):
        encoded = [encoder.join(_piece(sample, number), piece) for number, piece in pieces]
        return [replace(piece, num_pieces=len(pieces)) for piece in encoded], "split"
    raise DataError(
        f"the sample has {length} tokens, a pack at most {max_tokens}"
        + ("" if policy == "error" else f", and {policy} cannot make it fit"),
        "raise data.pack_tokens, shorten the sample, or choose another data.over_long",
    )


def _teaches(runs: list[Run]) -> bool:
    """Whether something has a loss besides ``<eos>``."""
    return any(run.has_loss and len(run.ids) for run in runs)


def _truncated(runs: list[Run], vocabulary: Vocabulary, excess: int) -> list[Run] | None:
    """Runs without the ends of the longest texts; None if the least of every text is too long."""
    runs = list(runs)
    # <unconditional> is one token, and stays
    texts = [i for i, run in enumerate(runs) if run.grid is None]
    for i in sorted(texts, key=lambda i: -len(runs[i].ids)):
        if excess <= 0:
            break
        ids = _beginning(runs[i].ids, len(runs[i].ids) - excess, vocabulary)
        excess -= len(runs[i].ids) - len(ids)
        runs[i] = runs[i]._replace(ids=ids)
    return runs if excess <= 0 else None


def _beginning(ids: Ids, num: int, vocabulary: Vocabulary) -> Ids:
    """The first ``num`` ids of a text or, so that no character is cut, a few fewer; in any case as many as show something."""
    visible = (k for k in range(1, min(len(ids), 2 * BYTES_OF_A_CHARACTER) + 1) if vocabulary.decode_text(ids[:k]).strip(BLANK))
    least = next(visible, min(1, len(ids)))
    for end in range(num, max(least, num - BYTES_OF_A_CHARACTER), -1):
        if not vocabulary.decode_text(ids[:end]).endswith("\N{REPLACEMENT CHARACTER}"):
            return ids[:end]
    return ids[: max(least, num)]


def _split(runs: list[Run], max_tokens: int) -> list[tuple[int, list[Run]]]:
    """Pieces that fit and have something to learn, with their numbers; none if a part is too long."""
    cuts = [0, *(i for i, run in enumerate(runs) if run.grid and i > 0), len(runs)]
    pieces, begin = [], 0
    while begin < len(cuts) - 1:
        # the longest run of parts that fits
        ends = (end for end in range(len(cuts) - 1, begin, -1) if num_tokens(runs[cuts[begin] : cuts[end]]) <= max_tokens)
        end = next(ends, None)
        if end is None:
            return []
        pieces.append(runs[cuts[begin] : cuts[end]])
        begin = end
    return [(number, piece) for number, piece in enumerate(pieces) if _teaches(piece)]


def _piece(sample: Sample, number: int) -> Sample:
    return replace(sample, coordinates=sample.coordinates._replace(piece=number))
