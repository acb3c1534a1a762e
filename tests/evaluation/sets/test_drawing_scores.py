"""Scores of drawings against values computed by hand; the benchmark `shapes` as a detector."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import linalg

from megavlm.benchmarks import shapes
from megavlm.errors import MegavlmError
from megavlm.evaluation.frechet import Moments, frechet_distance, mean_and_covariance
from megavlm.evaluation.sets.entries import BadEntries, Item
from megavlm.evaluation.sets.features import ClipScore, FidScore, real_moments
from megavlm.evaluation.sets.objects import Detection, ObjectScore, Request, directions, mistakes, read_requests


def box(kind, x, y, side=10, score=1.0, color=None):
    return Detection(**{"class": kind}, box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2), score=score, color=color)


def test_directions_need_a_gap_and_the_larger_part_of_the_way():
    centre = box("a", 50, 50)
    assert directions(box("b", 20, 50), centre) == {"left of"} and directions(box("b", 80, 52), centre) == {"right of"}
    assert directions(box("b", 50, 20), centre) == {"above"} and directions(box("b", 50, 80), centre) == {"below"}
    assert directions(box("b", 80, 80), centre) == {"right of", "below"}
    # the gap is 0.1 · (10 + 10) = 2: of an offset of 4, 2 are left, which is half and not more; of 4.1 it is more
    assert directions(box("b", 54, 50), centre) == set() and directions(box("b", 54.1, 50), centre) == {"right of"}
    assert directions(centre, centre) == set()


def test_mistakes_by_hand():
    request = Request(
        prompt="",
        include=[{"class": "cat", "count": 2}, {"class": "dog", "color": "red", "position": ["left of", 0]}],
        exclude=[{"class": "cat", "count": 3}],
    )
    cats, dog = [box("cat", 60, 50), box("cat", 80, 50)], box("dog", 20, 50, color="red")
    assert mistakes([*cats, dog], request) == []
    assert mistakes([*cats, box("dog", 70, 50, color="red")], request) == ["dog is not left of cat"]
    assert mistakes([*cats, box("dog", 20, 50, color="blue")], request) == ["dog is blue, not red"]
    assert mistakes([*cats, box("dog", 20, 50)], request) == ["dog is of no known colour, not red"]
    assert mistakes(cats, request) == ["0 of 1 dog"]
    assert mistakes([cats[0], dog], request) == ["1 of 2 cat"]
    assert mistakes([*cats, dog, box("cat", 90, 90)], request) == ["3 cat, wanted fewer than 3"]
    # of more than are wanted the most certain count
    assert mistakes([*cats, dog, box("dog", 25, 50, score=0.5, color="blue")], request) == []


def test_object_score_by_tag_and_doubtful_detections():
    def detect(image):
        return [{"class": "cat", "box": [0, 0, 1, 1], "score": float(image[0, 0, 0]) / 100}]

    def item(tag):
        return Item("", "", Request(prompt="", include=[{"class": "cat"}], tag=tag), group=tag)

    score = ObjectScore(detect)
    images = np.zeros((4, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = [50, 20, 50, 95]
    score.add([item("single"), item("single"), item("counting"), item("counting")], images)
    assert score.result()["by_tag"] == {t: {"drawings": 2, "accuracy": 0.5} for t in ("counting", "single")}
    score.add([item("single")], images[:1])
    assert score.result()["overall"] == pytest.approx((2 / 3 + 1 / 2) / 2) and score.result()["accuracy_of_all_drawings"] == 3 / 5
    with pytest.raises(MegavlmError, match="detector gave something else"):
        ObjectScore(lambda image: [{"kind": "cat"}]).add([item("x")], images[:1])


def test_requests_are_checked(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "a cat", "include": [{"class": "cat"}], "tag": "single_object"}\n'
        '{"prompt": "a cat", "include": [{"class": "cat", "position": ["left of", 0]}]}\n'
        "not json\n"
    )
    bad = BadEntries(file, 5)
    (item,) = read_requests(file, bad)
    assert (item.where, item.prompt, item.group) == ("line 1", "a cat", "single_object")
    assert [entry["where"] for entry in bad.found] == ["line 2", "line 3"]
    assert "no earlier object" in bad.found[0]["what"] and "broken JSON" in bad.found[1]["what"]


def detect_shapes(image):
    """A detector for drawings of `shapes`: what `see` finds, with boxes in pixels."""
    found = []
    for shape in shapes.see(image):
        half = shapes.SIDES[shape.size] / 2
        corners = (shape.x - half, shape.y - half, shape.x + half, shape.y + half)
        found.append({"class": shape.form, "color": shape.color, "box": [len(image) * c for c in corners], "score": 1.0})
    return found


def test_shapes_seen_by_their_own_detector():
    rng, items, images, mirrored_images = np.random.default_rng(0), [], [], []
    for number in range(40):
        scene = shapes.scene(0, "train", number)
        if len({shape.form for shape in scene}) < len(scene):
            continue  # a class stands for one object here
        include = [{"class": shape.form, "color": shape.color} for shape in scene]
        if len(scene) > 1:
            first, second = scene[:2]
            dx, dy = first.x - second.x, first.y - second.y
            horizontal = abs(dx) > abs(dy)
            name = ("left of" if dx < 0 else "right of") if horizontal else ("above" if dy < 0 else "below")
            include = [include[1], include[0] | {"position": [name, 0]}, *include[2:]]
        asked = shapes.prompt(scene, rng).text
        items.append(Item("", asked, Request(prompt=asked, include=include), group=str(len(scene))))
        images.append(shapes.render(scene, 64))
        mirrored_images.append(shapes.render([replace(shape, x=1 - shape.x, y=1 - shape.y) for shape in scene], 64))
    assert len(items) > 20
    right, mirrored = ObjectScore(detect_shapes), ObjectScore(detect_shapes)
    right.add(items, np.stack(images))
    assert right.result()["overall"] == 1
    mirrored.add(items, np.stack(mirrored_images))
    by_tag = mirrored.result()["by_tag"]
    assert by_tag["1"]["accuracy"] == 1 and by_tag["2"]["accuracy"] == 0, "in a mirror the relation is wrong"


def test_frechet_distance_against_formulas():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(200, 5)), rng.normal(size=(150, 5)) @ rng.normal(size=(5, 5)) + 1
    (m1, c1), (m2, c2) = mean_and_covariance(first), mean_and_covariance(second)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected)
    # in one dimension: (difference of means)² + (difference of standard deviations)²
    assert frechet_distance(np.zeros(1), np.array([[4.0]]), np.array([3.0]), np.array([[25.0]])) == pytest.approx(9 + 9)
    moments = Moments(m2)
    for part in (first[:7], first[7:8], first[8:]):
        moments.add(part)
    for streamed, whole in zip(moments.result(), (m1, c1)):
        np.testing.assert_allclose(streamed, whole, atol=1e-12)


def test_fid_of_drawings_equal_to_the_real_ones_is_zero(tmp_path):
    real = np.random.default_rng(0).integers(0, 256, (30, 2, 2, 3)).astype(np.uint8)

    def features(images):
        return images.reshape(len(images), -1)[:, :4]

    np.save(tmp_path / "real.npy", features(real))
    np.savez(tmp_path / "real.npz", features=features(real))
    mean, cov = mean_and_covariance(features(real))
    np.savez(tmp_path / "moments.npz", mu=mean, sigma=cov)
    for name in ("real.npy", "real.npz", "moments.npz"):
        score = FidScore(features, real_moments(tmp_path / name))
        for part in (real[:13], real[13:]):
            score.add([Item("", "", None)] * len(part), part)
        assert score.result()["fid"] == pytest.approx(0, abs=1e-6) and score.result()["feature_width"] == 4
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(MegavlmError, match="holds no real features"):
        real_moments(tmp_path / "bad.npy")
    with pytest.raises(MegavlmError, match="gives 2 numbers per image"):
        FidScore(lambda images: np.zeros((len(images), 2)), (mean, cov)).add([Item("", "", None)], real[:1])


def test_clip_score_by_hand():
    image = {0: [3.0, 4.0], 1: [0.0, 2.0]}
    text = {"x": [1.0, 0.0], "y": [0.0, -5.0]}
    score = ClipScore(lambda images: [image[int(i[0, 0, 0])] for i in images], lambda texts: [text[t] for t in texts])
    images = np.zeros((2, 1, 1, 3), np.uint8)
    images[1] = 1
    verdicts = score.add([Item("", "x", None), Item("", "y", None)], images)
    # cosines 3/5 and -1
    assert verdicts == [{"cosine": 0.6, "clip_score": 1.5}, {"cosine": -1.0, "clip_score": 0.0}]
    assert score.result() == {"clip_score": pytest.approx(0.75), "cosine_x100": pytest.approx(-20)}
    with pytest.raises(MegavlmError, match="--image_features gave"):
        ClipScore(lambda images: np.zeros(3), lambda texts: np.zeros((2, 2))).add([Item("", "x", None)] * 2, images)
