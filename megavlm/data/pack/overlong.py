"""Samples longer than a pack, by policy. Every one of them is counted; see `OverLong` for what happens to it."""

from dataclasses import replace

import numpy as np

from megavlm.data.pack.config import OverLong
from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.read.sample import Sample
from megavlm.errors import DataError


def encode_within(sample: Sample, encoder: Encoder, max_tokens: int, policy: OverLong) -> tuple[list[EncodedSample], str | None]:
    """Encode a sample into samples of at most ``max_tokens`` tokens.

    Returns:
        The encoded samples, and how the policy acted: None, ``skipped``, ``truncated`` or ``split``.

    Raises:
        DataError: Without a place, under the policy `error`, or where the policy cannot make the sample fit.
    """
    encoded = encoder(sample)
    if encoded.num_tokens <= max_tokens:
        return [encoded], None
    if policy == "skip":
        return [], "skipped"
    if policy == "truncate_text" and (shorter := _truncated(sample, encoder, encoded.num_tokens - max_tokens)):
        return [shorter], "truncated"
    if policy == "split_images" and (pieces := _split(sample, encoder, max_tokens)):
        return pieces, "split"
    raise DataError(
        f"the sample has {encoded.num_tokens} tokens, a pack at most {max_tokens}"
        + ("" if policy == "error" else f", and {policy} cannot make it fit"),
        "raise data.pack_tokens, shorten the sample, or choose another data.over_long",
    )


def _truncated(sample: Sample, encoder: Encoder, excess: int) -> EncodedSample | None:
    vocabulary = encoder.vocabulary
    texts = [i for i, segment in enumerate(sample.segments) if segment.text is not None]
    ids = {i: vocabulary.encode_text(sample.segments[i].text) for i in texts}
    segments = list(sample.segments)
    for i in sorted(texts, key=lambda i: -len(ids[i])):
        # a text is not cut away entirely: one token stays; encoding a cut text again may give a token more
        while excess > 0 and len(ids[i]) > 1:
            ids[i] = ids[i][: max(1, len(ids[i]) - excess)]
            before = len(vocabulary.encode_text(segments[i].text))
            segments[i] = segments[i].model_copy(update={"text": vocabulary.decode_text(ids[i])})
            excess -= before - len(vocabulary.encode_text(segments[i].text))
    return encoder(replace(sample, segments=tuple(segments))) if excess <= 0 else None


def _split(sample: Sample, encoder: Encoder, max_tokens: int) -> list[EncodedSample]:
    cuts = [0, *(i for i, s in enumerate(sample.segments) if s.image is not None and i > 0), len(sample.segments)]
    pieces, begin = [], 0
    while begin < len(cuts) - 1:
        # the longest run of parts that fits
        for end in range(len(cuts) - 1, begin, -1):
            segments = sample.segments[cuts[begin] : cuts[end]]
            piece = replace(sample, segments=segments, coordinates=sample.coordinates._replace(piece=len(pieces)))
            encoded = encoder(piece)
            if encoded.num_tokens <= max_tokens:
                break
        else:
            return []
        pieces.append(encoded)
        begin = end
    return [piece for piece in pieces if np.any(piece.has_loss)]
