"""Answers and drawings step by step: what comes at last is what the judge would get."""

import numpy as np
import pytest
import torch

from megavlm.errors import MegavlmError
from megavlm.evaluation.prompts import to_draw, to_read
from megavlm.evaluation.sampling import answer, draw_images
from megavlm.parts.trained import load_trained
from megavlm.randomness import Purpose, integer_seed
from megavlm.talk.talker import Talker, Writing, last, read_settings
from megavlm.talk.words import read_parts, turns_of
from tests.evaluation.test_sampling import AlwaysSays


@pytest.fixture(scope="module")
def talker(run):
    return Talker(load_trained(run)[0])


def test_a_prompt_is_laid_out_as_a_sample_of_the_training(talker, images):
    encoder = talker.model.encoder
    vocabulary = encoder.vocabulary
    picture, text = read_parts([str(images / "0.png"), "thinner"])
    codes = (encoder.image_tokenizer.encode([picture]) + vocabulary.first_code).flatten().tolist()
    image, words, blank = [vocabulary.boi, *codes, vocabulary.eoi], vocabulary.encode_text(text), [vocabulary.first_code] * 64
    read = to_read(encoder, ["what", picture, text])
    assert read.tokens.tolist() == [vocabulary.bos, *vocabulary.encode_text("what"), *image, *words] and not read.has_loss.any()
    drawn = to_draw(encoder, [picture, text])
    assert drawn.tokens.tolist() == [vocabulary.bos, *image, *words, vocabulary.boi, *blank, vocabulary.eoi, vocabulary.eos]
    assert [span.has_loss for span in drawn.spans] == [False, True]
    blind = to_draw(encoder, [picture, text], is_unconditional=True)
    assert blind.tokens.tolist() == [
        vocabulary.bos,
        *image,
        vocabulary.unconditional,
        vocabulary.boi,
        *blank,
        vocabulary.eoi,
        vocabulary.eos,
    ]


def test_an_answer_grows_into_what_the_judge_gets(talker, images):
    model = talker.model
    parts = [*read_parts([str(images / "0.png"), "Which digit is this?"]), "seven", "And this?", *read_parts([str(images / "1.png")])]
    steps = list(talker.answer(parts, Writing(max_tokens=5)))
    prompts = [to_read(model.encoder, parts)]
    (whole,) = answer(model.backbone, model.encoder, prompts, model.costing, device=model.device, max_tokens=5)
    assert steps[-1].text == whole and steps[-1].ended == "length" and steps[-1].num_tokens == 5
    assert [step.num_tokens for step in steps] == [1, 2, 3, 4, 5] and not any(step.ended for step in steps[:-1])
    warm = [last(talker.answer(parts, Writing(max_tokens=5, temperature=50.0, seed=seed))).text for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert last(talker.answer(parts, Writing(max_tokens=5, temperature=50.0, top_k=1))).text == whole


def test_an_answer_ends_at_its_end(run, images):
    talker = Talker(load_trained(run)[0])
    talker.model.backbone.causal_lm.lm_head = AlwaysSays(talker.model.encoder.vocabulary.eos, talker.model.encoder.vocabulary.size)
    assert [step.ended for step in talker.answer(["Hello?"], Writing())] == ["stop"]


def test_a_drawing_grows_row_by_row_into_what_the_sampler_draws(talker, images):
    model = talker.model
    parts = read_parts([str(images / "0.png"), "a handwritten seven"])
    drawing = talker.drawing_settings(num=2, seed=3, temperature=2.0, guidance=3.0)
    sketches = list(talker.draw(parts, drawing))
    codes = draw_images(
        model.backbone,
        model.encoder,
        [parts] * 2,
        model.costing,
        device=model.device,
        seed=integer_seed(3, Purpose.DRAWING),
        temperature=2.0,
        guidance=3.0,
    )
    whole = model.image_tokenizer.decode(codes)
    assert (sketches[-1].pictures == whole).all() and sketches[-1].share == 1 and (whole[0] != whole[1]).any()
    assert len(sketches) == 8
    for rows, sketch in enumerate(sketches, 1):
        assert (sketch.pictures[:, :rows] == whole[:, :rows]).all() and (sketch.pictures[:, rows:] == 255).all()
    assert talker.picture_size == (8, 8)


def test_the_condition_of_a_drawing_counts(talker, images):
    first, second = (read_parts([str(images / name), "a seven"]) for name in ("0.png", "1.png"))
    drawing = talker.drawing_settings(seed=1, temperature=1.0)
    backbone = talker.model.backbone
    with torch.no_grad():
        backbone.causal_lm.lm_head.weight.mul_(30)
    drawn = [last(talker.draw(parts, drawing)).pictures for parts in (first, first, second)]
    with torch.no_grad():
        backbone.causal_lm.lm_head.weight.div_(30)
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_what_is_too_long_is_refused_at_once(talker, images):
    assert talker.longest == 256
    four = read_parts([str(images / "0.png")] * 4)
    with pytest.raises(MegavlmError, match=r"(?s)takes 2\d\d tokens with its images, the model is made for 255.*do:.*take out images"):
        talker.answer([*four, "Which?"], Writing())
    with pytest.raises(MegavlmError, match="and the drawing, the model is made for 256"):
        talker.draw([*four[:3], "a seven"], talker.drawing_settings())
    nearly = [*four[:3], "Which? " * 12]
    room = talker.longest - to_read(talker.model.encoder, nearly).num_tokens
    assert 0 < room < 64
    assert last(talker.answer(nearly, Writing(max_tokens=64, temperature=1e4))).num_tokens == room


def test_words_are_texts_and_images(images):
    picture, text = read_parts(["0.png", "What is 0.5?"], images)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8 and text == "What is 0.5?"
    assert turns_of(["a.png", "b.JPG", "What?", "Why?"]) == [["a.png", "b.JPG", "What?"], ["Why?"]]
    for words in ([], ["What?", "a.png"], ["a.png"]):
        with pytest.raises(MegavlmError, match="no question behind the last image"):
            turns_of(words)
    for name, what in (("broken.png", "cannot be read as an image"), ("gone.png", "No such file")):
        with pytest.raises(MegavlmError, match=f"(?s){what}.*do:    give the path of a PNG"):
            read_parts([name], images)


def test_settings_that_cannot_be_are_named(talker):
    with pytest.raises(MegavlmError, match="max_tokens: Input should be greater than 0"):
        read_settings(Writing, {"max_tokens": 0})
    with pytest.raises(MegavlmError, match="temperature: .*guidance: "):
        talker.drawing_settings(temperature=0, guidance=-1)
