"""Pre-tokenised shards: every image member (``img0.png``) becomes one of codes (``img0.npy``); keys, order and all else stay.

A shard is written under a temporary name and renamed when it is complete, so what is there under its own name is whole, and a run that
was interrupted goes on with the shards that are missing. ``image_tokenizer.json`` beside them names the tokenizer; another one is
refused, here and when a run trains on them. The bytes do not depend on the number of processes: each shard is one process's, on one thread.

Letters: h and w rows and columns of codes.
"""

import io
import json
import logging
import multiprocessing
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import numpy as np
import torch

from megavlm.data.read.index import read_index, write_index
from megavlm.data.read.place import reading_sample
from megavlm.data.read.sample import IMAGE_TYPES, decode_image
from megavlm.data.read.shards import Members, read_shard, refuse_unread
from megavlm.data.read.urls import is_local, local_path
from megavlm.errors import ConfigError, DataError, MegavlmError
from megavlm.image_tokenizers.protocol import ImageTokenizer
from megavlm.system.files import read_json, write_atomically
from megavlm.system.progress import Progress

log = logging.getLogger(__name__)

MANIFEST = "image_tokenizer.json"
SAMPLES_AT_ONCE = 256
"""Samples whose images are encoded together; part of what the bytes depend on."""
RAW_TYPES = tuple(kind for kind in IMAGE_TYPES if kind != "npy")


def encode_shards(urls: list[str], out: Path, tokenizer: ImageTokenizer, processes: int, *, devices: list[str]) -> tuple[int, int]:
    """Write a pre-tokenised copy of each shard, with an index beside it, into a folder.

    Args:
        urls: Tars of any format.
        out: Folder; may hold some of them already, encoded with the same tokenizer.
        tokenizer: Encodes; must be picklable.
        processes: Shards that are encoded at a time.
        devices: Where, in turn.

    Returns:
        Number of shards encoded, and of shards that were there.

    Raises:
        ConfigError: If two shards have the same name, or the folder holds codes of another tokenizer.
        DataError: If a shard or an image is broken; the other shards are finished first.
    """
    names = {}
    for url in urls:
        if (other := names.setdefault(_name(url), url)) != url:
            raise ConfigError(f"{url} and {other} have the same name\n  do:    encode them into different folders")
    out.mkdir(parents=True, exist_ok=True)
    _write_manifest(out, tokenizer)
    missing = []
    for name, url in names.items():
        if not (out / name).is_file():
            missing.append((url, out / name))
        elif read_index(str(out / name)) is None:
            known = read_index(url)
            write_index(out / name, known and known.sample_format)  # interrupted between the shard and its index
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for number in range(processes):
        queue.put(devices[number % len(devices)])
    errors, losses = [], Counter()
    with (
        Progress("encode shards", len(names), done=len(names) - len(missing)) as bar,
        ProcessPoolExecutor(processes, context, _start_worker, (tokenizer, queue)) as pool,
    ):
        for future in as_completed([pool.submit(_encode_in_worker, url, path) for url, path in missing]):
            result = future.result()
            if isinstance(result, MegavlmError):
                errors.append(result)
            else:
                losses += result
            bar.advance()
    for loss in ("cut", "squashed"):
        if losses[loss]:
            log.warning("%d of %d images are %s (the tokenizer's fit)", losses[loss], losses["images"], loss)
    if errors:
        raise errors[0]
    return len(missing), len(names) - len(missing)


def encode_shard(url: str, path: Path, tokenizer: ImageTokenizer) -> Counter:
    """Write a pre-tokenised copy of one shard and its index; under its name there is all of it or nothing.

    Returns:
        How many images there were, and how many lost what (`ImageTokenizer.loss_of`).
    """
    temporary = path.with_name(f".{path.name}.encoding")
    samples = read_shard(url)
    losses = Counter()
    with temporary.open("wb") as file:
        # not WebDataset's writer: it sorts members, and leaves out some
        with tarfile.open(fileobj=file, mode="w|") as tar:
            while chunk := list(islice(samples, SAMPLES_AT_ONCE)):
                for name, content in _encoded(url, chunk, tokenizer, losses):
                    header = tarfile.TarInfo(name)
                    header.size, header.mode = len(content), 0o444
                    tar.addfile(header, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    known = read_index(url)
    write_index(path, known and known.sample_format)
    return losses


def check_codes(urls: list[str], tokenizer: ImageTokenizer) -> None:
    """Compare a run's image tokenizer with the one that encoded its shards, for local ones that say so.

    Raises:
        ConfigError: If it is another one.
    """
    folders = dict.fromkeys(Path(local_path(url)).parent for url in urls if is_local(url))
    for folder in folders:
        if (folder / MANIFEST).is_file():
            _compare(folder, _describe(tokenizer.of_shards))


def _encoded(url: str, samples: list[tuple[str, Members]], tokenizer: ImageTokenizer, losses: Counter) -> Iterator[tuple[str, bytes]]:
    """The members of some samples, by their names in the tar; what their images lose is counted."""
    images = []
    for key, members in samples:
        with reading_sample("", url, key):
            refuse_unread(members)
            _refuse_one_name(members)
            images += [_image(members, name) for name in members if _kind(name) in RAW_TYPES]
    losses["images"] += len(images)
    losses.update(loss for image in images if (loss := tokenizer.loss_of(image)))
    codes_Nhw = iter(tokenizer.encode(images) if images else ())
    dtype = np.uint16 if tokenizer.codebook_size <= 1 << 16 else np.int32
    for key, members in samples:
        for name, content in members.items():
            if _kind(name) in RAW_TYPES:
                yield f"{key}.{_name_of_codes(name)}", _npy(next(codes_Nhw).astype(dtype))
            else:
                yield f"{key}.{name}", content


def _refuse_one_name(members: Members) -> None:
    """Images of two kinds under one name would both become its codes."""
    names = Counter(_name_of_codes(name) for name in members if _kind(name) in IMAGE_TYPES)
    for name, count in names.items():
        if count > 1:
            given = [member for member in members if _kind(member) in IMAGE_TYPES and _name_of_codes(member) == name]
            raise DataError(f"{' and '.join(given)} would both become {name}", "take out all but one")


def _name_of_codes(name: str) -> str:
    return f"{name.removesuffix(_kind(name))}npy"


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _image(members: Members, name: str) -> np.ndarray:
    # decode_image wants a name and a type; a pair's only image has no name
    return decode_image("image", {f"image.{_kind(name)}": members[name]})


def _npy(codes_hw: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, codes_hw)
    return content.getvalue()


def _name(url: str) -> str:
    name = PurePosixPath(local_path(url) if is_local(url) else urlparse(url).path).name
    for suffix in (".tar", ".tar.gz", ".tgz"):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".tar"
    raise ConfigError(f"{url} is no tar, so there are no images in it\n  do:    write shards with `megavlm data build` first")


def _describe(tokenizer: ImageTokenizer) -> dict:
    sizes = {name: getattr(tokenizer, name) for name in ("codebook_size", "height", "width")}
    return {"fingerprint": tokenizer.fingerprint, **sizes}


def _write_manifest(out: Path, tokenizer: ImageTokenizer) -> None:
    described = _describe(tokenizer)
    if (out / MANIFEST).is_file():
        _compare(out, described)
        return
    write_atomically(out / MANIFEST, json.dumps(described, indent=1))


def _compare(folder: Path, described: dict) -> None:
    found = read_json(folder / MANIFEST)
    different = [name for name in described if found.get(name) != described[name]]
    if different:
        lines = "\n".join(f"  {name}: {found.get(name)} in the folder, {described[name]} here" for name in different)
        raise ConfigError(
            f"{folder} holds codes of another image tokenizer:\n{lines}\n"
            "  do:    use the tokenizer that made them (its fit too), or encode the shards again into another folder"
        )


def _start_worker(tokenizer: ImageTokenizer, devices: multiprocessing.Queue) -> None:
    global _tokenizer
    torch.set_num_threads(1)
    _tokenizer = tokenizer
    _tokenizer.to(torch.device(devices.get()))
    # a worker whose parent was killed would finish its shard and then wait for ever
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(url: str, path: Path) -> MegavlmError | Counter:
    try:
        return encode_shard(url, path, _tokenizer)
    except MegavlmError as error:
        return error
