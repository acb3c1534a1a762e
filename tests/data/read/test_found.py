"""Cases that were found by trying hostile data, each once silently wrong, without a place, or without an end."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from megavlm.data.pack.overlong import encode_within
from megavlm.data.read import formats
from megavlm.data.read.index import read_index, write_index
from megavlm.data.read.pixels import decode_pixels
from megavlm.data.read.sample import Coordinates
from megavlm.data.read.shards import read_shard
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import lint
from megavlm.errors import DataError
from tests.data.conftest import ids, pair, write_shard


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(value: int) -> bytes:
    return encoded(Image.new("RGB", (8, 8), (value, value, value)))


def problems(path, format="megavlm", **source) -> list[str]:
    return [str(problem) for problem in lint([str(path)], SourceConfig(shards="none", format=format, **source)).problems]


# --- LLaVA's images


def llava(names, members, key="k", **source):
    turns = [{"from": "human", "value": "<image>" * len(names)}, {"from": "gpt", "value": "yes"}]
    document = json.dumps({"image": names, "conversations": turns}).encode()
    place = Coordinates(0, 0, 0, 0)
    return formats.parse(key, {"json": document, **members}, SourceConfig(shards="none", format="llava", **source), place, seed=0)


def shades(sample) -> list[int]:
    return [int(sample.images[f"img{i}"][0, 0, 0]) for i in range(len(sample.images))]


@pytest.mark.parametrize("member", ["img{}.png", "{}.png", "{:03d}.png", "view_{}.png"])
def test_llava_images_come_in_the_order_of_their_numbers(member):
    members = {member.format(i): png(10 * i) for i in reversed(range(13))}
    assert shades(llava([f"coco/{i * 7919 % 100}.jpg" for i in range(13)], members)) == [10 * i for i in range(13)]


def test_llava_images_come_in_the_order_of_the_json():
    members = {"a.png": png(1), "b.png": png(2), "c.png": png(3)}
    assert shades(llava(["c.png", "x/a.png", "k.b.png"], members)) == [3, 1, 2]
    assert shades(llava(["b.png", "b.png"], {"b.png": png(2)})) == [2, 2]
    assert shades(llava(["any/name.jpg"], {"png": png(9)})) == [9]


@pytest.mark.parametrize(
    ("names", "members"),
    [
        (["a.png"], ["a.png", "b.png"]),
        ([], ["png"]),
        (["a.png", "b.png"], ["x.png", "y.png"]),
        (["x/a.png", "y/a.png"], ["a.png"]),
        (["a.png", "b.png"], ["img0.png", "img2.png"]),
        ([3], ["png"]),
    ],
)
def test_llava_images_that_cannot_be_told_apart_or_are_not_named_are_refused(names, members):
    with pytest.raises(DataError, match="image"):
        llava(names, dict.fromkeys(members, png(1)))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["pipe.png", "loop.png", "a\0b.png", "folder", "", "x" * 5000 + ".png"])
def test_llava_files_that_are_none_are_refused_with_their_place(tmp_path, name):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to("loop.png")
    record = {"id": "me", "image": [name], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (found,) = problems(tmp_path / "a.json", "llava", image_root=str(root))
    assert "sample me" in found and "a.json" in found


# --- images


def test_images_of_every_mode_are_converted_rightly():
    deep = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    assert decode_pixels("a.png", encoded(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 0, 1, 0x80, 0xFF]
    for mode, colour in (("LA", (0, 0)), ("RGBA", (255, 0, 0, 0))):
        assert decode_pixels("a.png", encoded(Image.new(mode, (2, 2), colour))).min() == 255, "what is transparent stands on white"
    half = decode_pixels("a.png", encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert half[0, 0].tolist() == [127, 127, 127]
    opaque = Image.new("RGBA", (1, 1), (9, 8, 7, 255))
    assert decode_pixels("a.png", encoded(opaque))[0, 0].tolist() == [9, 8, 7]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert decode_pixels("a.png", encoded(palette, transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert decode_pixels("a.png", encoded(Image.new("L", (1, 1), 7), transparency=7))[0, 0].tolist() == [255] * 3
    assert decode_pixels("a.png", encoded(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3
    assert decode_pixels("a.jpg", encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_stand_as_exif_says(kind, orientation):
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # the upper left corner is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_pixels("a", encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    height, width = pixels.shape[:2]
    assert (height, width) == ((32, 16) if orientation in (5, 6, 7, 8) else (16, 32))
    corners = {(0, 0): (1, 5, 0, 9), (0, -1): (2, 6), (-1, -1): (3, 7), (-1, 0): (4, 8)}
    white = next(corner for corner, kinds in corners.items() if orientation in kinds)
    assert {corner for corner in corners if pixels[corner].min() > 128} == {white}


def test_a_transparent_colour_of_sixteen_bits_is_refused():
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel, key = struct.pack(">HHH", *3 * [0x1234]), struct.pack(">HHH", *3 * [0x12])
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + pixel)) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="16 bits a channel and a transparent colour"):
        decode_pixels("a.png", b"\x89PNG\r\n\x1a\n" + chunks)


def test_animations_are_refused():
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 200)]
    for kind in ("PNG", "WEBP"):
        with pytest.raises(DataError, match="animation of 2 frames"):
            decode_pixels("a", encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


# --- samples


def test_two_images_under_one_name_and_images_without_a_segment_are_refused(tmp_path):
    good = pair("understanding", 2)
    write_shard(tmp_path / "a.tar", [("a", good | {"img0.png": png(1)}), ("b", good | {"img1.png": png(1)}), ("c", good)])
    assert [p for p in problems(tmp_path / "a.tar") if "sample a" in p and "is there as png and as npy" in p]
    assert [p for p in problems(tmp_path / "a.tar") if "sample b" in p and "no segment names the images ['img1.png']" in p]
    write_shard(tmp_path / "b.tar", [("a", {"png": png(1), "jpg": png(1), "txt": b"x"})])
    assert "more than one image" in problems(tmp_path / "b.tar", "img2dataset")[0]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "half a character \\ud800"}',
        '{"text": "a", "number": ' + "9" * 5000 + "}",
        '{"text": ' + "[" * 100_000,
        '{"text": "' + "x" * (17 << 20) + '"}',
    ],
    ids=["surrogate", "digits", "deep", "long"],
)
def test_lines_that_cannot_be_read_have_a_place(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    (found,) = problems(tmp_path / "a.jsonl", "text")
    assert "sample 00000001" in found and "a.jsonl" in found and len(found) < 4000


def test_whatever_a_format_raises_has_a_place(tmp_path, make_factory):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 3)
    assert len(problems(tmp_path / "a.jsonl", "tests.data.read.test_found:stumbles")) == 3
    sources = {"s": {"shards": str(tmp_path / "a.jsonl"), "format": "text", "epochs": 1}}
    lane = make_factory(sources, num_lanes=1, max_errors=3)(0)
    lane.sources[0].config.__dict__["format"] = "tests.data.read.test_found:stumbles"
    assert list(lane) == [] and lane.counts["errors"] == 3


def stumbles(key, members, source, rng):
    return {}[key]


def test_a_sample_with_nothing_to_learn_is_an_error(tmp_path, make_factory):
    empty = {"json": {"task": "understanding", "segments": [{"text": "a question"}, {"text": " \n", "loss": True}]}}
    good = {"json": {"task": "text", "segments": [{"text": "one", "loss": True}]}}
    write_shard(tmp_path / "a.tar", [("a", empty), ("b", good)])
    assert "nothing to learn" in problems(tmp_path / "a.tar")[0]
    # what the tokenizer makes nothing of is seen where it is encoded
    lane = make_factory({"s": {"shards": str(tmp_path / "a.tar"), "epochs": 1}}, num_lanes=1, max_errors=1)(0)
    sample = formats.parse("b", {"json": json.dumps(good["json"]).encode()}, lane.sources[0].config, Coordinates(0, 0, 0, 0), seed=0)
    lane.encoder.vocabulary.encode_text = lambda text: []
    with pytest.raises(DataError, match="nothing to learn"):
        encode_within(sample, lane.encoder, 100, "error")


# --- shards


def test_what_macos_leaves_in_folders_is_no_data(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("d/._0.json", "d/0.json", "d/._0.img0.npy", "d/0.img0.npy", "d/.DS_Store", "__MACOSX/d/._0.json"):
            members = pair("understanding", 2)
            content = b"Mac OS X" if "._" in name or "DS" in name else members["img0.npy"]
            content = json.dumps(members["json"]).encode() if name == "d/0.json" else content
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    assert problems(tmp_path / "a.tar") == []
    assert [key for key, _ in read_shard(str(tmp_path / "a.tar"))] == ["d/0"]


def test_a_file_without_key_or_extension_does_not_vanish(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("README", "d/.json", "a."):
            tar.addfile(tarfile.TarInfo(name))
    assert len([p for p in problems(tmp_path / "a.tar") if "belongs to no sample" in p]) == 3


def test_what_cannot_be_printed_is_escaped():
    text = str(DataError("half \ud800, a bell \a\x1b[31m", "do", shard="a", key="k\udcff\n"))
    text.encode()
    assert "\x1b" not in text and "\a" not in text


def test_an_empty_shard_beside_full_ones_is_no_error(tmp_path, make_factory):
    text = {"json": {"task": "text", "segments": [{"text": "one", "loss": True}]}}
    write_shard(tmp_path / "0.tar", [(str(i), text) for i in range(3)])
    for i in range(1, 6):
        write_shard(tmp_path / f"{i}.tar", [])
    lane = make_factory({"s": {"shards": f"{tmp_path}/{{0..5}}.tar"}}, num_lanes=6, look_ahead_samples=2)(0)
    assert all(ids(next(lane)[0]) for _ in range(5))
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(DataError, match="no shard of the source holds a sample"):
        for _ in range(20):
            next(lane)


@pytest.mark.parametrize("broken", [b"", b"x" * 600, None], ids=["empty", "garbage", "cut"])
def test_max_errors_covers_the_shards_that_a_start_looks_at(tmp_path, make_factory, broken):
    samples = [(str(i), pair("generation", 2)) for i in range(5)]
    write_shard(tmp_path / "0.tar", samples)
    write_shard(tmp_path / "1.tar", samples)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2 + 100] if broken is None else broken)
    sources = {"s": {"shards": f"{tmp_path}/{{0..1}}.tar", "epochs": 1}}
    with pytest.raises(DataError, match="unreadable"):
        make_factory(sources, num_lanes=1)
    lane = make_factory(sources, num_lanes=1, max_errors=1)(0)
    assert list(lane) and lane.counts["errors"] == 1


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "null", '{"bytes": 10240, "samples": -1}', "\xff"])
def test_a_broken_index_is_none(tmp_path, text):
    write_shard(tmp_path / "a.tar", [("a", pair("generation", 2))])
    assert write_index(tmp_path / "a.tar").samples == 1
    (tmp_path / "a.tar.index.json").write_bytes(text.encode("latin-1"))
    assert read_index(str(tmp_path / "a.tar")) is None


def test_codes_of_an_endless_image_are_refused():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 13, 1 << 12)})
    members = pair("understanding", 1) | {"img0.npy": header.getvalue() + bytes(1 << 25)}
    members["json"] = json.dumps(members["json"]).encode()
    with pytest.raises(DataError, match="more than any image has"):
        formats.parse("k", members, SourceConfig(shards="none"), Coordinates(0, 0, 0, 0), seed=0)
