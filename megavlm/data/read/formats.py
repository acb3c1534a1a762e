"""Formats: how the members of a sample become a record and its images. Read without conversion:

    megavlm      our own schema (`megavlm.data.read.sample`), interleaved documents with both tasks in one sample included
    img2dataset  jpg|png|webp + txt and/or json with "caption": a pair, which way round is a coin
    llava        {"image": "a.jpg" | [...], "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}]}, from a
                 JSON or JSONL file with the images in a folder (`image_root`), or from a tar with the images beside the json
    qa           {"image": "a.png" | [...], "question": "…", "answer": "…"}, images as in llava; "answers": [...] gives the commonest
    text         {"text": "…"}
    interleaved  {"texts": ["…", null, …], "images": [null, "img0", …]} (as in OBELICS and MMC4), in a tar

A format of your own is a function, named in the recipe as ``module:function`` or ``file.py:function``::

    def my_format(key, members, source, rng):
        return Record(task="text", segments=(Segment(text=members["txt"].decode(), loss=True),)), {}

It gets the key, ``{extension: bytes}``, the recipe's `SourceConfig` and a function that makes the sample's own random generator; it
returns a `Record` and the encoded images by member name (``img0.png``). What is wrong with a sample it reports as a `DataError`.
"""

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
from pydantic import ValidationError

from megavlm.data.read.index import DEFAULT_FORMAT
from megavlm.data.read.llava import llava_images
from megavlm.data.read.sample import (
    IMAGE_TYPES,
    Coordinates,
    Record,
    Sample,
    Segment,
    image_names,
    make_sample,
    parse_record,
    refuse_unnamed,
)
from megavlm.data.read.shards import Members, refuse_unread
from megavlm.errors import ConfigError, DataError
from megavlm.randomness import Purpose, stream
from megavlm.system.user_code import import_attribute

Format = Callable[[str, Members, object, Callable[[], np.random.Generator]], tuple[Record, Members]]

FORMATS: dict[str, Format] = {}


def register_format(name: str) -> Callable[[Format], Format]:
    """Make a function known under a name, for use in this process; spawned workers need ``module:function``."""

    def register(function: Format) -> Format:
        FORMATS[name] = function
        return function

    return register


def find_format(name: str) -> Format:
    """The function of a format by its name, or by ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: If there is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        what = f"data.sources: there is no format {name[:200]!r}"
        raise ConfigError(f"{what}\n  do:    use one of {', '.join(FORMATS)}, or module:function, or file.py:function")
    try:
        return import_attribute(name)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"data.sources: format {name[:200]} cannot be imported: {type(error).__name__}: {error}\n"
            "  do:    give module:function, or file.py:function"
        ) from error


def parse(key: str, members: Members, source, coordinates: Coordinates, *, seed: int) -> Sample:
    """Decode one sample of a source.

    Args:
        key: Its name in the shard.
        members: What the shard holds of it.
        source: The `SourceConfig`, which names the format.
        coordinates: Where it stands.
        seed: Of chances such as the direction of a pair, which depend on the coordinates only.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    refuse_unread(members)

    def rng() -> np.random.Generator:
        return stream(seed, Purpose.FORMAT, *coordinates[:4])

    try:
        record, members = find_format(source.format or DEFAULT_FORMAT)(key, members, source, rng)
    except ValidationError as error:
        raise DataError(f"the sample is not usable: {error.errors()[0]['msg']}", "correct or remove the sample") from error
    return make_sample(key, record, members, coordinates)


@register_format("megavlm")
def _megavlm(key: str, members: Members, source, rng) -> tuple[Record, Members]:
    record = parse_record(members)
    refuse_unnamed(image_names(record), members)
    return record, members


@register_format("img2dataset")
def _img2dataset(key: str, members: Members, source, rng) -> tuple[Record, Members]:
    kinds = [kind for kind in IMAGE_TYPES if kind in members]
    if not kinds:
        raise DataError(f"the pair has no image, only {sorted(members)}", "remove it, or choose another format")
    if len(kinds) > 1:
        raise DataError(f"the pair has more than one image: {', '.join(kinds)}", "take out all but one")
    text = members.get("txt")
    caption = _utf8(text) if text is not None else _document(members).get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError("the pair has no caption", "remove it, or choose another format")
    chance = rng()
    caption = Segment(text=caption.strip(), loss=True)
    if chance.random() < source.generation_ratio:
        record = Record(task="generation", segments=(Segment(text=caption.text), Segment(image="img0", loss=True)))
    else:
        request = source.caption_requests[int(chance.integers(len(source.caption_requests)))]
        record = Record(task="understanding", segments=(Segment(image="img0"), Segment(text=request), caption))
    return record, {f"img0.{kinds[0]}": members[kinds[0]]}


@register_format("llava")
def _llava(key: str, members: Members, source, rng) -> tuple[Record, Members]:
    document = _document(members)
    turns, images = document.get("conversations"), document.get("image") or []
    images = images if isinstance(images, list) else [images]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("the sample has no list of conversations", "write it in LLaVA's schema")
    found = llava_images(key, images, members, source.image_root)
    segments, num_used = [], 0
    for turn in turns:
        value, from_model = turn.get("value"), turn.get("from") in ("gpt", "assistant")
        if not isinstance(value, str):
            raise DataError("a turn of the conversation has no text", "write it in LLaVA's schema")
        for i, text in enumerate(value.split("<image>")):
            if i:
                segments.append(Segment(image=f"img{num_used}", loss=from_model))
                num_used += 1
            if text.strip():
                segments.append(Segment(text=text.strip(), loss=from_model))
    if num_used != len(images):
        raise DataError(f"the turns name {num_used} images, the sample has {len(images)}", "correct the sample")
    return Record(task="understanding" if images else "text", segments=tuple(segments)), found


@register_format("qa")
def _qa(key: str, members: Members, source, rng) -> tuple[Record, Members]:
    document = _document(members)
    names = document.get("image") or []
    names = names if isinstance(names, list) else [names]
    several = document.get("answers")
    answers = [_worded(answer, "answer") for answer in several] if isinstance(several, list) and several else []
    question = _worded(document.get("question"), "question")
    # of several people's answers that of most
    answer = Counter(answers).most_common(1)[0][0] if answers else _worded(document.get("answer"), "answer")
    images = llava_images(key, names, members, source.image_root)
    segments = [Segment(image=f"img{i}") for i in range(len(names))]
    segments += [Segment(text=question), Segment(text=answer, loss=True)]
    meta = {name: document[name] for name in ("choices", "split", "kind") if name in document}
    return Record(task="understanding" if names else "text", segments=tuple(segments), meta={"answer": answer, **meta}), images


@register_format("text")
def _text(key: str, members: Members, source, rng) -> tuple[Record, Members]:
    text = _utf8(members["txt"]) if "txt" in members else _document(members).get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError('the sample has no "text"', "remove it, or choose another format")
    return Record(task="text", segments=(Segment(text=text, loss=True),)), {}


@register_format("interleaved")
def _interleaved(key: str, members: Members, source, rng) -> tuple[Record, Members]:
    document = _document(members)
    texts, images = document.get("texts"), document.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise DataError('the sample needs lists "texts" and "images" of one length', "correct the sample")
    segments, chance = [], rng()
    for text, image in zip(texts, images):
        if (text is None) == (image is None) or not isinstance(text or image, str):
            raise DataError("each place of an interleaved document has either a text or an image", "correct the sample")
        # every image is drawn or read: a coin for each, so that both tasks stand in one document
        loss = image is None or chance.random() < source.generation_ratio
        segments.append(Segment(text=text, image=image and image.rsplit(".", 1)[0], loss=loss))
    drawn = any(segment.image and segment.loss for segment in segments)
    task = "generation" if drawn else "understanding" if any(images) else "text"
    record = Record(task=task, segments=tuple(segments))
    refuse_unnamed(image_names(record), members)
    return record, members


def _worded(text: object, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"the sample has no text in {name!r}", f'write {{"image": …, "question": …, "answer": …}}; {name!r} is text')
    return text.strip()


def _utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the text is not UTF-8: {error}", "write text as UTF-8") from error


def _document(members: Members) -> dict:
    if "json" not in members:
        raise DataError(f"the sample has no json member, only {sorted(members)}", "choose another format")
    try:
        document = json.loads(_utf8(members["json"]))
    # numbers of thousands of digits are a ValueError
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON: {error}", "write the json member as UTF-8 JSON") from error
    if not isinstance(document, dict):
        raise DataError("the JSON is no object", "write the json member as an object")
    return document
