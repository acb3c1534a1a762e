import numpy as np
import pytest

from megavlm.data.pack.encode import Encoder
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.errors import DataError
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.routing.tasks import Task
from megavlm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(digits_folder):
    return Vocabulary(digits_folder / "text.model", 17)


def sample(task, *segments, codes=None, index=0):
    image = np.zeros((8, 8), np.int64) if codes is None else codes
    return Sample("k", task, segments, {"img0": image}, Coordinates(0, 0, 0, index))


DRAW = (Segment(text="draw a seven"), Segment(image="img0", loss=True))
READ = (Segment(image="img0"), Segment(text="which?"), Segment(text="seven", loss=True))


def test_generation_sequence(vocabulary):
    codes = np.arange(4).reshape(2, 2)
    encoded = Encoder(vocabulary, PixelTokenizer(17, 8, 8))(sample("generation", *DRAW, codes=codes))
    text = vocabulary.encode_text("draw a seven")
    image = [vocabulary.boi, *(vocabulary.first_code + np.arange(4)), vocabulary.eoi]
    assert encoded.tokens.tolist() == [vocabulary.bos, *text, *image, vocabulary.eos]
    assert encoded.has_loss.tolist() == [False] * (1 + len(text)) + [True] * 7
    assert set(encoded.tasks[encoded.has_loss]) == {Task.GENERATION}
    (span,) = encoded.spans
    assert encoded.tokens[span.start : span.start + span.length].tolist() == image[1:-1]


def test_understanding_learns_the_answer_only(vocabulary):
    encoded = Encoder(vocabulary, PixelTokenizer(17, 8, 8))(sample("understanding", *READ))
    learned = encoded.tokens[encoded.has_loss].tolist()
    assert learned == [*vocabulary.encode_text("seven"), vocabulary.eos]
    assert set(encoded.tasks[encoded.has_loss]) == {Task.UNDERSTANDING}


def test_a_tenth_of_the_generation_prompts_becomes_unconditional_and_always_the_same_ones(vocabulary):
    encoder = Encoder(vocabulary, PixelTokenizer(17, 8, 8), 0.1, seed=3)
    chosen = [vocabulary.unconditional in encoder(sample("generation", *DRAW, index=i)).tokens for i in range(2000)]
    assert 160 < sum(chosen) < 240
    assert chosen == [vocabulary.unconditional in encoder(sample("generation", *DRAW, index=i)).tokens for i in range(2000)]
    other = Encoder(vocabulary, PixelTokenizer(17, 8, 8), 0.1, seed=4)
    assert chosen != [vocabulary.unconditional in other(sample("generation", *DRAW, index=i)).tokens for i in range(2000)]
    assert not any(vocabulary.unconditional in encoder(sample("understanding", *READ, index=i)).tokens for i in range(200))


@pytest.mark.parametrize("code", [-1, 17])
def test_codes_outside_the_codebook(vocabulary, code):
    with pytest.raises(DataError, match="outside the codebook of 17"):
        Encoder(vocabulary, PixelTokenizer(17, 8, 8))(sample("generation", *DRAW, codes=np.full((2, 2), code)))


def test_pixel_tokenizer_is_exact_on_its_own_images():
    tokenizer = PixelTokenizer(17, 8, 8)
    codes = np.random.default_rng(0).integers(0, 17, (5, 8, 8))
    assert (tokenizer.encode(tokenizer.decode(codes)) == codes).all()
    assert tokenizer.encode(np.full((1, 32, 16, 3), 255, np.uint8)).tolist() == [[[16] * 8] * 8]
