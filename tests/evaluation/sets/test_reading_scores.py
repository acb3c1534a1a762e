"""Scores of answers and captions against values computed by hand."""

import math

import pytest

from megavlm.evaluation.sets.captions import CaptionScore, bleu, cider_d, words
from megavlm.evaluation.sets.entries import Item
from megavlm.evaluation.sets.vqa import VqaScore, exact_match, normalise, vqa_score
from megavlm.evaluation.sets.yes_no import YesNoScore, yes_or_no


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("A Dog.", "dog"),
        ("the cat's  toy", "cat's toy"),
        ("100,978", "100978"),
        ("3.5 meters.", "3.5 meters"),
        ("red, white/blue", "red white blue"),
        ("2:50 p.m.", "2:50 pm"),
        ("Two", "2"),
        ("dont know", "don't know"),
        ("isn’t", "isn't"),
    ],
)
def test_normalised_answers(given, expected):
    assert normalise(given) == expected


def test_vqa_score_by_hand():
    for agreeing, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        answers = ["The dog."] * agreeing + [f"cat {i}" for i in range(10 - agreeing)]
        assert vqa_score("dog", answers) == pytest.approx(expected)


def test_exact_match_is_the_usual_answer_or_any_of_different_ones():
    assert exact_match("Dog", ["dog", "puppy"]) and exact_match("puppy", ["dog", "puppy"])
    assert exact_match("dog", ["a dog", "dog", "puppy"]) and not exact_match("puppy", ["dog", "dog", "puppy"])
    assert not exact_match("cat", ["dog"])


def test_vqa_figures_by_group():
    score = VqaScore()
    ten = ["red"] * 3 + ["blue"] * 7
    truths = [(ten, "color")] * 2 + [(["4"], "number"), (["x"], "")]
    items = [Item(str(n), "?", truth, "a", group) for n, (truth, group) in enumerate(truths)]
    verdicts = score.add(items, ["red", "blue", "four", "y"])
    assert verdicts[0] == {"answer": "red", "exact_match": False, "vqa_score": pytest.approx(0.9)}
    result = score.result()
    assert result["exact_match"] == 0.5 and result["vqa_score"] == pytest.approx(0.95) and result["questions_with_ten_answers"] == 2
    assert result["by_group"] == {
        "color": {"questions": 2, "exact_match": 0.5, "vqa_score": pytest.approx(0.95)},
        "number": {"questions": 1, "exact_match": 1.0, "vqa_score": None},
    }


def test_yes_no_figures_by_hand():
    said = {
        "Yes.": "yes", "no": "no", "Yes, not one but two": "yes", "There isn't": "no", "It is not there": "no",
        "a dog": "unclear", "nobody knows": "unclear",
    }  # fmt: skip
    assert {text: yes_or_no(text) for text in said} == said
    score = YesNoScore()
    labels = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]
    answers = ["yes", "yes", "no", "yes", "no", "no", "what?", "hm"]
    score.add([Item(str(i), "?", label, "a", "popular") for i, label in enumerate(labels)], answers)
    figures = score.result()
    # true yes 2 of 3 said, of 4 labelled; true no 2
    assert figures["accuracy"] == 4 / 8 and figures["precision"] == 2 / 3 and figures["recall"] == 2 / 4
    assert figures["f1"] == pytest.approx(4 / 7) and figures["yes_ratio"] == 3 / 8 and figures["unclear_answers"] == 2
    assert figures["by_group"]["popular"]["questions"] == 8
    never = YesNoScore()
    never.add([Item("1", "?", "yes")], ["no"])
    assert never.result()["f1"] == 0 and never.result()["precision"] == 0


def split(*captions):
    return [caption.split() for caption in captions]


def test_bleu_by_hand():
    refs = [split("the cat sat on the mat", "a cat is on a mat", "the cat")]
    assert bleu(split("the cat sat on the mat"), refs) == 1
    # 5 of 5 words, 3 of 4 pairs ("cat on" is nowhere), 1 of 3 triples, no four
    assert bleu(split("the cat on the mat"), refs) == 0
    # words 6/7 (the second "the" of three is clipped away), pairs 5/6, triples 4/5, fours 3/4; longer than the reference: no penalty
    assert bleu(split("the cat sat on the mat the"), refs) == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    # all of 5, 4, 3, 2; one word shorter than the closest reference
    assert bleu(split("the cat sat on the"), refs) == pytest.approx(math.exp(1 - 6 / 5))


def test_cider_d_by_hand():
    references = [split("red dog", "red fox"), split("blue cat")]
    # words: red 1, dog 1 in one image of two: weight log 2. Each of g is (log 2, log 2).
    # to "red dog": 1 for words, 1 for the pair; to "red fox": half the words; n = 3, 4 have nothing
    same, other = cider_d(split("red dog", "cat"), references)
    assert same == pytest.approx((10 / 2 * (1 + 0.5) + 10 / 2 * (1 + 0)) / 4)
    # "cat" to "blue cat": cosine 1/√2, one word shorter
    assert other == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4)
    # three times the word does not help: clipped to one, and the norm grows; a word in every image weighs nothing
    repeated = cider_d(split("cat cat cat", "cat"), [split("cat", "dog"), split("dog")])
    assert repeated[0] == pytest.approx(10 / 2 * math.exp(-4 / 72) * 1 / 3 / 4)
    assert cider_d(split("dog", "dog"), [split("dog"), split("dog")]) == [0, 0]


def test_caption_score_splits_words_and_takes_the_mean():
    assert words("A dog's ball, isn't it? 2x") == ["a", "dog's", "ball", "isn't", "it", "2x"]
    score = CaptionScore()
    score.add([Item("1", "", ["Red dog.", "red fox"])], ["red dog"])
    score.add([Item("2", "", ["Blue cat!"])], ["cat"])
    both = cider_d(split("red dog", "cat"), [split("red dog", "red fox"), split("blue cat")])
    assert score.result() == {"cider_d": pytest.approx(sum(both) / 2), "bleu_4": 0}
