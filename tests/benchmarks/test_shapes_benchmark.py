"""The judgement of shapes: real images get full marks, each mistake is seen where it is counted, the tokenizer's loss is the ceiling."""

import numpy as np
import pytest

from megavlm.benchmarks.shapes import record, render
from megavlm.benchmarks.shapes_benchmark import ShapesBenchmark
from megavlm.data.read.sample import Coordinates, Sample
from megavlm.errors import ConfigError
from megavlm.evaluation.benchmark import find_benchmark
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.image_tokenizers.protocol import DenseCodes

NUM = 40


def sample(split, task, number):
    made, shapes = record(0, split, task, number)
    return Sample(f"{split}-{number}", made.task, made.segments, {"img0": render(shapes, 32)}, Coordinates(0, 0, 0, number), made.meta)


class Exact(DenseCodes):
    """A tokenizer that loses nothing: a code is the number of a picture."""

    def __init__(self):
        self.pictures = []

    def encode(self, images):
        self.pictures += list(images)
        first = len(self.pictures) - len(images)
        return np.arange(first, first + len(images)).reshape(-1, 1, 1)

    def decode(self, codes):
        return np.stack([self.pictures[int(code)] for code in np.asarray(codes).reshape(-1)])


@pytest.fixture(scope="module")
def samples():
    return [sample(split, task, n) for split in ("seen", "test") for task in ("understanding", "generation") for n in range(NUM)]


def test_real_images_get_full_marks_by_split_and_number_of_shapes(samples):
    benchmark = ShapesBenchmark(samples, 2 * NUM, Exact())
    assert len(benchmark.questions) == len(benchmark.requests) == 2 * NUM
    asked = [s for s in samples if s.task == "generation"]
    assert benchmark.requests == [s.segments[0].text for s in asked]
    report = benchmark.judge(np.stack([s.images["img0"] for s in asked]))
    assert set(report["by_split"]) == {"seen", "test"} and set(report) == {*report["by_split"]["seen"], "by_split"}
    for found, number in ((report, 2 * NUM), *((split, NUM) for split in report["by_split"].values())):
        assert (found["shapes"], found["relation"], found["accuracy_by_judge"], found["drawings"]) == (1, 1, 1, number)
        assert set(found["accuracy_by_number_of_shapes"].values()) == {1.0} and set(found["accuracy_by_number_of_shapes"]) == {
            "1",
            "2",
            "3",
            "4",
        }
        assert found["ceiling"]["accuracy_by_judge"] == 1 and found["ceiling"]["frechet_distance"] == pytest.approx(
            found["frechet_distance"]
        )


def test_what_is_wrong_lowers_what_it_should(samples):
    benchmark, asked = ShapesBenchmark(samples, 2 * NUM, Exact()), [s for s in samples if s.task == "generation"]
    images = np.stack([s.images["img0"] for s in asked])
    only_test = images.copy()
    only_test[NUM:] = 255
    report = benchmark.judge(only_test)
    assert report["accuracy_by_judge"] == report["shapes"] == 0.5
    whole, report = report["frechet_distance"], report["by_split"]
    assert (
        report["seen"]["accuracy_by_judge"] == 1
        and report["test"]["accuracy_by_judge"] == report["test"]["shapes"] == report["test"]["relation"] == 0
    )
    assert (
        report["test"]["frechet_distance"] > whole > report["seen"]["frechet_distance"]
        and report["test"]["ceiling"]["accuracy_by_judge"] == 1
    )
    turned = benchmark.judge(images[:, ::-1, ::-1])["by_split"]["seen"]  # relations do not survive, most shapes do
    assert turned["relation"] < 0.2 and turned["shapes"] > turned["relation"]
    grey = ShapesBenchmark(samples, 2 * NUM, PixelTokenizer(17, 32, 32)).judge(images)["by_split"]["seen"]
    assert grey["accuracy_by_judge"] == 1 and grey["ceiling"]["accuracy_by_judge"] < 0.5, "the ceiling is the tokenizer's"


def test_both_tasks_are_needed_and_names_are_checked(samples):
    with pytest.raises(ConfigError, match="needs questions and requests"):
        ShapesBenchmark([s for s in samples if s.task == "understanding"], 10, Exact())
    assert find_benchmark("shapes") is ShapesBenchmark and find_benchmark("tests.benchmarks.test_shapes_benchmark:Exact") is Exact
    with pytest.raises(ConfigError, match="use one of digits, shapes, or module:Class"):
        find_benchmark("shape")
