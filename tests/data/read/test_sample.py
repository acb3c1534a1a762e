import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from megavlm.data.read.sample import Coordinates, parse_sample
from megavlm.errors import DataError

PLACE = Coordinates(0, 0, 0, 0)
DOCUMENT = {"task": "understanding", "segments": [{"image": "img0"}, {"text": "which?"}, {"text": "seven", "loss": True}]}


def png(color=(10, 20, 30)):
    stream = io.BytesIO()
    Image.new("RGB", (4, 2), color).save(stream, "PNG")
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def parse(document=DOCUMENT, **members):
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_sample("k", {"json": content} | members, PLACE)


def test_pixels_and_codes():
    assert parse(**{"img0.png": png()}).images["img0"].tolist() == [[[10, 20, 30]] * 4] * 2
    codes = np.arange(6, dtype=np.int32).reshape(2, 3)
    for layout in (codes, np.asfortranarray(codes)):
        assert parse(**{"img0.npy": npy(layout)}).images["img0"].tolist() == codes.tolist()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"img0.png": b"no image"}, "cannot be read as an image"),
        ({"img0.png": png()[:40]}, "cannot be read as an image"),
        ({}, "has no member"),
        ({"img0.npy": b"junk"}, "not an npy file"),
        ({"img0.npy": npy(np.zeros((2, 2)))}, "not codes"),
        ({"img0.npy": npy(np.zeros(4, int))}, "not codes"),
        ({"img0.npy": npy(np.zeros((2, 2), int))[:-1]}, "bytes"),
        ({"img0.npy": npy(np.array([[Bomb()]], dtype=object))}, "not codes"),
        ({"img0.npy": pickle.dumps(Bomb())}, "not an npy file"),
    ],
)
def test_bad_images(members, complaint):
    with pytest.raises(DataError, match=complaint):
        parse(**members)


def test_an_array_header_that_promises_too_much_allocates_nothing():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**6, 10**6)})
    with pytest.raises(DataError, match="bytes"):
        parse(**{"img0.npy": header.getvalue()})


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (b"{", "broken JSON"),
        (b"\xff\xfe", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        ({"task": "understanding"}, "segments"),
        ({"task": "drawing", "segments": [{"text": "a", "loss": True}]}, "task"),
        ({"task": "text", "segments": [{"text": "a"}]}, "nothing to learn"),
        ({"task": "text", "segments": [{"text": "a", "image": "b", "loss": True}]}, "either text or image"),
        ({"task": "text", "segments": [{"text": "a", "loss": True, "wait": 1}]}, "wait"),
    ],
)
def test_bad_json(document, complaint):
    with pytest.raises(DataError, match=complaint):
        parse(document)


def test_no_json():
    with pytest.raises(DataError, match="no json member"):
        parse_sample("k", {"img0.png": png()}, PLACE)
