"""Encoded images to uint8 RGB ``[H, W, 3]``: every mode that PNG, JPEG and WebP have is converted rightly, or refused by name.

16 bits a channel      the high byte, as for colours; Pillow alone would make nearly all grey levels white
transparency           stands on white, as in a browser; Pillow alone would show whatever colour is hidden
EXIF orientation       is applied: the image stands as it is meant to be seen
animations             are refused: their first frame is not what they show
CMYK                   Pillow's conversion, without colour profiles

Letters: H and W pixels, C colours. Tested by `tests/data/read/test_found.py`.
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image

from megavlm.errors import DataError

DEEP_MODES = ("I;16", "I;16B", "I;16L", "I")
"""Grey levels of 16 bits; which of these depends on Pillow."""
FLAT_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBX")
BIT_DEPTH = 24
"""Where a PNG says it."""
WHITE = (255, 255, 255)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the image upright."""


def decode_pixels(member: str, content: bytes) -> np.ndarray:
    """The image in a member.

    Raises:
        DataError: Without a place, if it cannot be read, or not rightly.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
                _refuse_deep_key(image, content)
                return _decoded(image)
    except DataError as error:
        error.what = f"{member} {error.what}"
        raise
    # Pillow raises whatever its decoders stumble over: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        raise DataError(f"{member} cannot be read as an image: {error}", "replace or remove the image") from error


def _decoded(image: Image.Image) -> np.ndarray:
    # a JPEG of several pictures (MPO) is one photograph with previews or depths
    if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP"):
        raise DataError(f"is an animation of {getattr(image, 'n_frames', 'several')} frames", "replace it by the frame that is meant")
    image.load()
    turned = UPRIGHT.get(_orientation(image))
    flat = _flat(image)
    return np.asarray(flat.transpose(turned) if turned is not None else flat)


def _refuse_deep_key(image: Image.Image, content: bytes) -> None:
    """Pillow keeps 8 bits of a PNG's 16, and compares them with 16 bits of the colour that is to be transparent."""
    if image.format == "PNG" and content[BIT_DEPTH] == 16 and isinstance(image.info.get("transparency"), tuple):
        raise DataError("has 16 bits a channel and a transparent colour", "write it with 8 bits, or an alpha channel")


def _flat(image: Image.Image) -> Image.Image:
    """As RGB."""
    transparent = image.info.get("transparency")
    if image.mode in DEEP_MODES:
        return _from_deep(np.asarray(image), transparent)
    if image.mode in ALPHA_MODES or transparent is not None:
        layers = image.convert("RGBA")
        flat = Image.new("RGB", image.size, WHITE)
        flat.paste(layers, mask=layers)
        return flat
    if image.mode not in FLAT_MODES:
        raise DataError(f"has the mode {image.mode}, which is not read", "write it as RGB")
    return image.convert("RGB")


def _from_deep(grey_HW: np.ndarray, transparent: int | None) -> Image.Image:
    if grey_HW.min() < 0 or grey_HW.max() > 0xFFFF:
        raise DataError("has grey levels of more than 16 bits", "write it with 8 or 16 bits")
    high_HW = (grey_HW >> 8).astype(np.uint8)
    if transparent is not None:
        high_HW[grey_HW == transparent] = 255
    return Image.fromarray(high_HW).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of whatever kind: an unreadable EXIF block says nothing of an orientation
        return 1
