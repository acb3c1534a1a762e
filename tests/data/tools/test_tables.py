"""Parquet, Arrow and what Hugging Face `datasets` saves, as its files are laid out: images as bytes beside their names, or as paths."""

import json

import pytest

from megavlm.data.read.index import format_of, read_index
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import Report, read_samples
from megavlm.data.tools.write import build_shards
from megavlm.errors import DataError, MegavlmError
from tests.data.read.test_formats import png

pyarrow = pytest.importorskip("pyarrow", reason="reading tables is the extra `data`")
from pyarrow import ipc, parquet  # noqa: E402


def picture(value, path=None):
    """An image as `datasets.Image` stores it."""
    return {"bytes": png(value), "path": path}


TURNS = [{"from": "human", "value": "<image> Which?"}, {"from": "gpt", "value": "Grey."}]
ROWS = {
    "qa": {"image": picture(9), "question": "Which?", "answer": "Grey."},
    "img2dataset": {"image": picture(9, "9.png"), "caption": "a grey square"},
    "llava": {"images": [picture(9)], "conversations": TURNS},
    "interleaved": {"texts": ["see", None], "images": [None, picture(9)]},
    "text": {"text": "words alone"},
}


def samples_of(source, tmp_path, **settings):
    written = build_shards(source, tmp_path / "out", 2, **settings)
    urls = [str(tmp_path / "out" / name) for name in written]
    report = Report()
    found = list(read_samples(urls, SourceConfig(shards="none", format=format_of(urls, None)), report))
    assert not report.problems and len(found) == sum(written.values())
    return found, read_index(urls[0]).sample_format


@pytest.mark.parametrize("sample_format", ROWS)
def test_rows_of_parquet_are_samples(tmp_path, sample_format):
    rows = [ROWS[sample_format]] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    samples, found = samples_of(tmp_path / "a.parquet", tmp_path)
    assert len(samples) == 3 and found == sample_format
    assert all(image[0, 0].tolist() == [9, 9, 9] for sample in samples for image in sample.images.values())
    assert all(len(sample.images) == (sample_format != "text") for sample in samples)


@pytest.mark.parametrize("column", ["photo", "image"])
def test_captions_under_other_names(tmp_path, column):
    """The commonest sets of captions have the columns `image` and `text`."""
    parquet.write_table(pyarrow.Table.from_pylist([{column: picture(3), "text": "grey"}]), tmp_path / "a.parquet")
    (sample,), found = samples_of(tmp_path / "a.parquet", tmp_path)
    assert found == "img2dataset" and "grey" in [segment.text for segment in sample.segments] and len(sample.images) == 1


def test_images_by_path(tmp_path):
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "a.png").write_bytes(png(7))
    parquet.write_table(pyarrow.Table.from_pylist([{"image": "im/a.png", "question": "Which?", "answer": "Grey."}]), tmp_path / "a.parquet")
    (sample,), _ = samples_of(tmp_path / "a.parquet", tmp_path)
    assert next(iter(sample.images.values()))[0, 0, 0] == 7


def save_to_disk(folder, rows):
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    for number in range(2):
        with ipc.new_stream(str(folder / f"data-{number:05d}-of-00002.arrow"), table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": []}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-0.arrow").write_bytes(b"what datasets keeps of earlier work")


def test_a_folder_that_datasets_saved(tmp_path):
    save_to_disk(tmp_path / "set", [ROWS["qa"]] * 5)
    samples, found = samples_of(tmp_path / "set", tmp_path)
    assert len(samples) == 10 and found == "qa" and len({sample.key for sample in samples}) == 10


def test_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "set" / split, [ROWS["qa"]])
    with pytest.raises(MegavlmError, match="holds several splits: .*test.*train"):
        build_shards(tmp_path / "set", tmp_path / "out", 10)
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        parquet.write_table(pyarrow.Table.from_pylist([ROWS["qa"]]), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(MegavlmError, match=r"holds several splits: .*test-\*.*train-\*"):
        build_shards(tmp_path / "hub", tmp_path / "out", 10)
    samples, _ = samples_of(tmp_path / "hub" / "train-*.parquet", tmp_path)
    assert len(samples) == 1


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"image": {"bytes": b"no picture", "path": None}, "question": "a", "answer": "b"}, "damaged, or none that can be read"),
        ({"image": {"bytes": None, "path": "gone.png"}, "question": "a", "answer": "b"}, "no file below"),
        ({"image": picture(1), "question": "a"}, "no text in 'answer'"),
        ({"image": picture(1), "label": 3}, "those of no format"),
    ],
)
def test_rows_that_are_no_samples(tmp_path, row, what):
    parquet.write_table(pyarrow.Table.from_pylist([row] * 2), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=what) as caught:
        build_shards(tmp_path / "a.parquet", tmp_path / "out", 10)
    assert "a.parquet row 0" in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 and nothing that follows it")
    with pytest.raises(DataError, match="the table is damaged"):
        build_shards(tmp_path / name, tmp_path / "out", 10)
