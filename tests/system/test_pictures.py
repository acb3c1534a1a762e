"""Pictures show any text as it is, and none of it ends the program."""

import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from megavlm.system import pictures
from megavlm.system.harmless import harmless
from megavlm.system.pictures import plain, save_grid

TEXTS = {
    "mathematics": r"between $\frac{1$ and $x^$",
    "one dollar": "a $5 note",
    "escaped already": r"\$x^$ and \\$y_$",
    "backslashes": r"C:\new\table \frac \\",
    "control characters": "a\x00b\x07c\x1b[31m\x7f",
    "half a surrogate pair": "\ud800 and \udc00",
    "lines": "one\r\ntwo\n\n\n\u2028three",
    "no glyphs": "数字の七 🦜 \U000e0041 \u202egnol",
    "very long": "word " * 50_000,
    "one very long word": "w" * 500_000,
    "nothing": "",
    "spaces": " \t\n ",
}
IMAGE = np.full((8, 8, 3), 128, np.uint8)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_can_be_a_caption_and_a_title(tmp_path, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        save_grid([IMAGE] * 2, [text] * 2, tmp_path / "grid.png", title=text)
    assert Image.open(tmp_path / "grid.png").size[1] < 400, "the text takes no more than its place"


@pytest.mark.parametrize("text", [r"between $\frac{1$ and $x^$", r"\$x^$ and \\$y_$", "a $5 note", "$$"])
def test_dollars_are_shown_as_they_are(text):
    """What the library draws, once it has looked for mathematics."""
    figure = pyplot.figure()
    drawn, is_math = figure.text(0, 0, "")._preprocess_math(plain(text))
    pyplot.close(figure)
    assert not is_math and drawn == text


def test_long_texts_are_cut_with_a_mark():
    assert plain("word " * 50, width=20, lines=2).endswith(" …") and plain("word " * 50, 20, 2).count("\n") == 1


def test_a_grid_of_nothing_says_so_and_one_of_too_many_shows_the_first(tmp_path, monkeypatch):
    save_grid([], [], tmp_path / "empty.png", title="nothing")
    assert (tmp_path / "empty.png").is_file()
    save_grid(np.zeros((0, 8, 8, 3), np.uint8), [], tmp_path / "also.png")
    monkeypatch.setattr(pictures, "MOST_IMAGES", 3)
    titles = []
    monkeypatch.setattr(pictures, "plain", lambda text, *_: titles.append(text) or "")
    save_grid([IMAGE] * 7, [""] * 7, tmp_path / "many.png", columns=2, title="t")
    assert titles == ["", "", "", "t (the first 3 of 7)"] and Image.open(tmp_path / "many.png").size == (300, 400)


def test_a_figure_that_cannot_be_written_is_forgotten_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_grid([IMAGE], ["a"], tmp_path / "file" / "grid.png")
    assert not pyplot.get_fignums()


def test_what_is_harmless_is_a_remark(caplog):
    with harmless("the picture RUN/a.png"):
        raise OSError(28, "No space left on device")
    assert "the picture RUN/a.png could not be written" in caplog.text and "No space left" in caplog.text
    with pytest.raises(KeyboardInterrupt), harmless("a picture"):
        raise KeyboardInterrupt
