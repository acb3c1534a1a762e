"""Host-side selectors: which tokens of a span stay.

A selector gives every token of a span a score; the lowest scores stay. It never looks at the content, so it may serve spans
that the model is to predict (P6).
"""

import numpy as np


def random(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Uniformly random scores ``[height*width]``: the baseline to beat."""
    return rng.random(height * width)


def stride(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Scores ``[height*width]`` that keep the span evenly covered at every share, the same in every draw.

    The order of the recursive ordered-dither matrix (Bayer 1973): the first quarter is every second token of every
    second row, the first sixteenth every fourth of every fourth.
    """
    y, x = np.divmod(np.arange(height * width), width)
    num_bits = int(max(height, width) - 1).bit_length()
    score = np.zeros(height * width, np.int64)
    for bit in range(num_bits):
        # the lowest bit of the place decides first, the diagonal neighbour before the one beside it
        quadrant = 2 * ((x >> bit & 1) ^ (y >> bit & 1)) + (y >> bit & 1)
        score = score * 4 + quadrant
    return score.astype(np.float64)


SELECTORS = {"random": random, "stride": stride}
