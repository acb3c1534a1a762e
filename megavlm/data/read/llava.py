"""The images of a LLaVA sample, in the order in which its JSON names them. Tested by `tests/data/read/test_formats.py`."""

import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megavlm.data.read.sample import IMAGE_TYPES, refuse_unnamed
from megavlm.data.read.shards import MAX_MEMBER_BYTES, Members
from megavlm.errors import DataError

NUMBERED = re.compile(r"(\D*)(\d+)")


def llava_images(key: str, names: Sequence[Any], members: Members, image_root: str | None) -> Members:
    """``img0.jpg``, ``img1.png``, …: the images that the JSON names, in its order.

    They are files of ``image_root``, or members of the sample: by the names in the JSON; or numbered by their places in its list, as
    `megavlm data build` writes them; or the only one.

    Args:
        key: Of the sample.
        names: What the JSON says.
        members: Of the sample.
        image_root: Folder of the images.

    Raises:
        DataError: Without a place, if an image is missing, is not named, or cannot be told from others.
    """
    if not all(isinstance(name, str) for name in names):
        raise DataError("the names of the sample's images are no texts", "write it in LLaVA's schema")
    if image_root is not None:
        refuse_unnamed((), members)
        root = Path(image_root).resolve()
        return {f"img{i}.{_kind(name)}": _read(root, name) for i, name in enumerate(names)}
    given = [member for member in members if _kind(member) in IMAGE_TYPES]
    found = _by_name(key, names, given) or _by_number(names, given)
    if found is None:
        raise DataError(
            f"the JSON names the images {list(names)}, the sample holds {given}",
            "name the members as the JSON does, or number them in its order: img0.jpg, img1.jpg, …",
        )
    return {f"img{i}.{_kind(member)}": members[member] for i, member in enumerate(found)}


def _by_name(key: str, names: Sequence[str], given: list[str]) -> list[str] | None:
    """The members by their names in the JSON: with the key or without, with folders or without."""
    by_name = {member.lower(): member for member in given} | {f"{key}.{member}".lower(): member for member in given}
    by_name |= {PurePosixPath(name).name: member for name, member in by_name.items()}
    found = [by_name.get(name.lower()) or by_name.get(PurePosixPath(name).name.lower()) for name in names]
    known = [member for member in found if member is not None]
    # two names are two images
    is_exact = len(known) == len(names) and set(known) == set(given) and len(set(known)) == len(set(names))
    return known if is_exact else None


def _by_number(names: Sequence[str], given: list[str]) -> list[str] | None:
    """The members by their numbers, which count the JSON's list from 0 or 1; one image needs none."""
    if len(names) != len(given) or len(given) < 2:
        return given if len(names) == len(given) else None
    stems = [stem for member in given if (stem := NUMBERED.fullmatch(member.rpartition(".")[0]))]
    if len(stems) < len(given) or len({stem[1] for stem in stems}) > 1:
        return None
    numbers = [int(stem[2]) for stem in stems]
    ordered = sorted(zip(numbers, given))
    first = ordered[0][0]
    return [member for _, member in ordered] if sorted(numbers) == list(range(first, first + len(given))) and first in (0, 1) else None


def _read(root: Path, name: str) -> bytes:
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"image {name!r} lies outside of image_root", "correct the sample")
        status = path.stat()
        # whoever reads a pipe waits for ever
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > MAX_MEMBER_BYTES:
            raise OSError(f"it has {status.st_size} bytes, the limit is {MAX_MEMBER_BYTES}")
        return path.read_bytes()
    # a loop of links is a RuntimeError, a zero in the name a ValueError
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"image {name!r} cannot be read: {error}", "check image_root, or remove the sample") from error


def _kind(name: str) -> str:
    return name.rpartition(".")[2].lower()
