import numpy as np

from megavlm.benchmarks import digits


def test_the_split_is_fixed_and_complete():
    train, test = digits.load("train"), digits.load("test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert test.labels[:5].tolist() == [0, 5, 0, 5, 0] and test.codes.max() == 16


def test_the_judge_knows_real_digits_and_tells_noise_from_them():
    judge, train = digits.Judge(), digits.load("train")
    assert judge.accuracy_on_real() > 0.97
    noise = np.random.default_rng(0).integers(0, 17, (200, 8, 8))
    assert judge.accuracy(noise, digits.prompts(200)[1]) < 0.3
    near, far = judge.distance_of_real(), judge.distance(noise)
    blurred = np.rint((train.codes + np.roll(train.codes, 1, axis=2)) / 2)
    assert near < judge.distance(blurred) < far


def test_prompts_cover_digits_and_phrasings_evenly():
    requests, labels = digits.prompts(100)
    assert np.bincount(labels).tolist() == [10] * 10
    assert len(set(requests)) == 50
    assert all(digits.WORDS[label] in request for request, label in zip(requests, labels))
