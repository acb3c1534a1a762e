"""Batches whose caches fit the device: by tokens, because a sequence of a thousand needs as much as ten of a hundred."""

from collections.abc import Iterator, Sequence

BATCH_TOKENS = 65536
"""Tokens of a batch, if nobody says otherwise."""


def batches(lengths: Sequence[int], most_tokens: int, most_sequences: int | None = None) -> Iterator[slice]:
    """Cut sequences, in their order, into runs that are decoded together.

    A cache has room for the longest sequence in every row, so a run counts as its longest times its number. A sequence that is longer than
    the limit is a run by itself.

    Args:
        lengths: Tokens of each sequence, with all that will be appended.
        most_tokens: Limit of a run.
        most_sequences: Limit of the sequences of a run.
    """
    begin = longest = 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        number = end - begin + 1
        if number > 1 and (longest * number > most_tokens or number > (most_sequences or number)):
            yield slice(begin, end)
            begin, longest = end, length
    if lengths:
        yield slice(begin, len(lengths))
