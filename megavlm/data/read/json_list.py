"""The elements of a JSON list from a stream, one at a time: a list of samples may be larger than the memory.

Tested by `tests/data/read/test_found.py`.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
MAX_CHARACTERS = 64 << 20
"""Of one element."""
WHITE = (" ", "\t", "\r", "\n")
_decoder = json.JSONDecoder()


def read_json_list(stream: BinaryIO) -> Iterator[Any]:
    """Yield the elements of the list that a stream holds.

    Raises:
        ValueError: If it holds something else, or ends before its end. Deep nesting raises RecursionError.
    """
    text = _Text(stream)
    if text.next_character() != "[":
        raise ValueError("the JSON file holds no list of samples")
    text.skip()
    while (character := text.next_character()) != "]":
        yield text.element()
        if (character := text.next_character()) == ",":
            text.skip()
            if text.next_character() == "]":
                raise ValueError("a comma stands before the list's end")
        elif character != "]":
            raise ValueError("the list is cut short" if not character else f"{character!r} stands between two elements of the list")
    text.skip()
    if text.next_character():
        raise ValueError("something follows the list's end")


class _Text:
    """The part of the stream that is being looked at, and the place in it."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        begin = stream.read(CHUNK_BYTES)
        self.decode = codecs.getincrementaldecoder(json.detect_encoding(begin))("surrogatepass").decode
        self.text = self.decode(begin)
        self.place = 0
        self.num_elements = 0

    def next_character(self) -> str:
        """The next one that is no white space; empty at the end."""
        while True:
            while self.text[self.place : self.place + 1] in WHITE:
                self.place += 1
            if self.place < len(self.text) or not self._more():
                return self.text[self.place : self.place + 1]

    def skip(self) -> None:
        self.place += 1

    def element(self) -> Any:
        while True:
            try:
                element, end = _decoder.raw_decode(self.text, self.place)
                # a number at the end may go on
                if end == len(self.text) and self._more():
                    continue
                # nothing was read since, or nothing came
                self.place = min(end, len(self.text))
                self.num_elements += 1
                return element
            except json.JSONDecodeError as error:
                if len(self.text) - self.place > MAX_CHARACTERS or not self._more():
                    raise ValueError(f"broken JSON: {error.msg} in element {self.num_elements}") from error

    def _more(self) -> bool:
        """Look at more of the stream, and forget what is behind."""
        content = self.stream.read(max(CHUNK_BYTES, len(self.text) - self.place))
        self.text = self.text[self.place :] + self.decode(content, not content)
        self.place = 0
        return bool(content)
