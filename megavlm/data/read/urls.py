"""Opening shards by URL. `file:` and `pipe:` are WebDataset's; `http:` and `https:` survive a server that drops connections.

A dropped connection is taken up again at the byte where it broke (HTTP range requests); a server without ranges is read again
from the start up to there. Whole shards from elsewhere can be kept in a local cache with a size limit.
"""

import hashlib
import http.client
import io
import logging
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import webdataset

log = logging.getLogger(__name__)

TIMEOUT_S = 60
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
TRANSIENT = (ConnectionError, TimeoutError, http.client.HTTPException, urllib.error.URLError)


class Opener:
    """Opens URLs for reading.

    Args:
        retries: How often in a row a connection is tried again without getting a byte, with doubling pauses.
        cache_dir: Folder for copies of shards that are not local files; None keeps none.
        cache_gib: Size limit of that folder; the copies used longest ago go first.
    """

    def __init__(self, retries: int = 5, cache_dir: str | None = None, cache_gib: float = 100.0):
        self.retries, self.cache_dir, self.cache_bytes = retries, cache_dir, int(cache_gib * 2**30)

    def __call__(self, url: str) -> BinaryIO:
        """The bytes of ``url``.

        Raises:
            OSError: If it cannot be opened, or breaks more often than ``retries`` allows.
        """
        if is_local(url) or self.cache_dir is None:
            return self._stream(url)
        return self._cached(url)

    def _stream(self, url: str) -> BinaryIO:
        if urlparse(url).scheme in ("http", "https"):
            return io.BufferedReader(_HttpStream(url, self.retries), 1 << 18)
        if is_local(url):
            return open(local_path(url), "rb", buffering=1 << 18)
        return webdataset.gopen(url)

    def _cached(self, url: str) -> BinaryIO:
        folder = Path(self.cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / (hashlib.sha256(url.encode()).hexdigest()[:32] + ".shard")
        try:
            stream = copy.open("rb")
            os.utime(copy)  # the time of the last use
            return stream
        except FileNotFoundError:
            pass
        # a name of its own: several processes may fetch the same shard at once, and the last one to finish wins
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fetching-", delete=False) as file:
            try:
                with self._stream(url) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            except BaseException:
                os.unlink(file.name)
                raise
        stream = open(file.name, "rb")
        os.replace(file.name, copy)
        self._evict(folder, copy)
        return stream

    def _evict(self, folder: Path, newest: Path) -> None:
        copies = []
        for path in folder.glob("*.shard"):
            try:
                copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process was faster
                continue
        excess = sum(size for _, size, _ in copies) - self.cache_bytes
        for _, size, path in sorted(copies):
            if excess <= 0:
                return
            if path != newest:
                # who has it open reads on
                path.unlink(missing_ok=True)
                excess -= size


def is_local(url: str) -> bool:
    """Whether ``url`` is a path or a `file:` URL."""
    return urlparse(url).scheme in ("", "file")


def local_path(url: str) -> str:
    """The path of a local ``url``."""
    return urlparse(url).path if url.startswith("file:") else url


class _HttpStream(io.RawIOBase):
    """The body of a URL, taken up again where a connection breaks."""

    def __init__(self, url: str, retries: int):
        self.url, self.retries = url, retries
        self.position, self.length, self._tag = 0, None, None
        self._response = None
        self._failures = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            try:
                if self._response is None:
                    self._connect()
                count = self._response.readinto(buffer)
                if count == 0 and self.length is not None and self.position < self.length:
                    raise ConnectionError(f"the connection ended at byte {self.position} of {self.length}")
                self.position += count
                self._failures = 0 if count else self._failures
                return count
            except urllib.error.HTTPError as error:
                # the server's answer, not its absence: only overload is worth another try
                if error.code not in (408, 425, 429, 500, 502, 503, 504):
                    raise OSError(f"{self.url}: HTTP {error.code} {error.reason}") from error
                self._pause(error)
            except TRANSIENT as error:
                self._pause(error)

    def _connect(self) -> None:
        request = urllib.request.Request(self.url)
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if self.position and tag != self._tag:
            raise OSError(f"{self.url} has changed while it was read")
        self._tag, size = tag, response.headers.get("Content-Length")
        skip = 0 if response.status == 206 else self.position
        if size is not None:
            self.length = int(size) + self.position - skip
        while skip:
            skipped = len(response.read(min(skip, 1 << 20)))
            if not skipped:
                raise ConnectionError("the connection ended on the way to where it had broken")
            skip -= skipped
        self._response = response

    def _pause(self, error: Exception) -> None:
        self._drop()
        self._failures += 1
        if self._failures > self.retries:
            raise OSError(f"{self.url}: gave up after {self._failures} failures in a row: {error}") from error
        log.info("%s: %s; trying again (%d of %d)", self.url, error, self._failures, self.retries)
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._failures - 1)))

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        self._drop()
        super().close()
