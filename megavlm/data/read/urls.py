"""Opening shards by URL. `file:` and `pipe:` are WebDataset's; `http:` and `https:` survive a server that drops connections.

A dropped connection is taken up again at the byte where it broke (HTTP range requests); a server without ranges, or with wrong ones, is
read again from the start up to there. Whole shards from elsewhere can be kept in a local cache with a size limit; a copy that turns out
to be broken is fetched again.
"""

import hashlib
import http.client
import io
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

log = logging.getLogger(__name__)

TIMEOUT_S = 60
MIN_BYTES = 1 << 16
"""A connection that brings fewer bytes in ``TIMEOUT_S`` is as good as none."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
TRANSIENT = (ConnectionError, TimeoutError, http.client.HTTPException, urllib.error.URLError)
OVERLOAD = (408, 425, 429, 500, 502, 503, 504)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
FETCHING = ".fetching-"
FETCH_DAYS = 1
"""A fetch older than this was killed."""


class Opener:
    """Opens URLs for reading.

    Args:
        retries: How often in a row a connection is tried again without getting a byte, with doubling pauses.
        cache_dir: Folder for copies of shards that are not local files; None keeps none.
        cache_gib: Size limit of that folder; the copies used longest ago go first.
    """

    def __init__(self, retries: int = 5, cache_dir: str | None = None, cache_gib: float = 100.0):
        self.retries = retries
        self.cache_dir = cache_dir
        self.cache_bytes = int(cache_gib * 2**30)

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
        # here, because it brings torch, and who reads files needs none
        from webdataset.gopen import gopen

        return cast(BinaryIO, gopen(url))  # a pipe reads as a file does

    def _cached(self, url: str) -> BinaryIO:
        copy = self._copy(url)
        folder = copy.parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stream = copy.open("rb")
            os.utime(copy)  # the time of the last use
            return stream
        except FileNotFoundError:
            pass
        # a name of its own: several processes may fetch the same shard at once, and the last one to finish wins
        with tempfile.NamedTemporaryFile(dir=folder, prefix=FETCHING, delete=False) as file:
            try:
                with self._stream(url) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            except BaseException:
                os.unlink(file.name)
                raise
        fetched = Path(file.name)
        stream = fetched.open("rb")
        os.replace(fetched, copy)
        self._evict(folder, copy)
        return stream

    def forget(self, url: str) -> None:
        """Remove the copy of a shard that turned out to be broken, so that the next reader fetches it again."""
        if self.cache_dir is not None and not is_local(url):
            self._copy(url).unlink(missing_ok=True)

    def _copy(self, url: str) -> Path:
        assert self.cache_dir is not None  # only a cache has copies
        return Path(self.cache_dir) / (hashlib.sha256(url.encode()).hexdigest()[:32] + ".shard")

    def _evict(self, folder: Path, newest: Path) -> None:
        copies = []
        for path in folder.glob(f"{FETCHING}*"):
            with suppress(FileNotFoundError):  # another process was faster
                if path.stat().st_mtime < time.time() - FETCH_DAYS * 86400:
                    path.unlink()
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


WITHOUT_CACHE = Opener()
"""What opens shards for those who were given no opener."""


class _Deadline:
    """Mixed into a connection: an answer whose head trickles in for longer than the timeout counts as none."""

    sock: socket.socket

    def getresponse(self) -> http.client.HTTPResponse:
        is_late = threading.Event()

        def cut() -> None:
            is_late.set()
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(TIMEOUT_S, cut)
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()  # pyright: ignore[reportAttributeAccessIssue]  (of the connection that it is mixed into)
        finally:
            timer.cancel()
        if is_late.is_set():
            raise TimeoutError(f"no answer in {TIMEOUT_S} s")
        return response


def _with_deadline(http_class: Any) -> Any:
    """The class of connections with `_Deadline` mixed in."""
    return type("_Connection", (_Deadline, http_class), {})


class _HttpHandler(urllib.request.HTTPHandler):
    def do_open(self, http_class, req, **options):
        return super().do_open(_with_deadline(http_class), req, **options)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def do_open(self, http_class, req, **options):
        return super().do_open(_with_deadline(http_class), req, **options)


_opener = urllib.request.build_opener(_HttpHandler, _HttpsHandler)


def is_local(url: str) -> bool:
    """Whether ``url`` is a path or a `file:` URL."""
    return urlparse(url).scheme in ("", "file")


def _is_lines(url: str) -> bool:
    return urlparse(url).path.lower().endswith(".jsonl")


def local_path(url: str) -> str:
    """The path of a local ``url``."""
    return urlparse(url).path if url.startswith("file:") else url


class _HttpStream(io.RawIOBase):
    """The body of a URL, taken up again where a connection breaks."""

    def __init__(self, url: str, retries: int):
        self.url = url
        self.retries = retries
        self.position = 0
        self.length: int | None = None
        self._tag: str | None = None
        self._has_ranges = True
        self._response: http.client.HTTPResponse | None = None
        self._failures = 0
        self._slow = 0
        """How often in a row the server hardly brought anything."""
        self._waited_s = 0.0
        """Time spent in here since it last brought enough: what the reader does in between is not the server's fault."""
        self._brought = 0
        """Bytes in that time."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            begin = time.monotonic()
            try:
                response = self._connect() if self._response is None else self._response
                # what is there, and not as much as fits: a slow server must not keep us here
                content = response.read1(len(buffer))
                if not content and self.length is not None and self.position < self.length:
                    raise ConnectionError(f"the connection ended at byte {self.position} of {self.length}")
                buffer[: len(content)] = content
                self.position += len(content)
                self._look_at_pace(len(content), time.monotonic() - begin)
                return len(content)
            except urllib.error.HTTPError as error:
                # the server's answer, not its absence: only overload is worth another try
                if error.code not in OVERLOAD:
                    raise OSError(f"{self.url}: HTTP {error.code} {error.reason}") from error
                self._pause(error)
            except TRANSIENT as error:
                self._pause(error)

    def _connect(self) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url)
        begin = self.position if self._has_ranges else 0
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        self._response = response = _opener.open(request, timeout=TIMEOUT_S)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        first, length = self._place_of(response, begin)
        length = length or self.length
        if self.position and (tag != self._tag or self.length not in (None, length)):
            raise OSError(f"{self.url} has changed while it was read")
        self._tag = tag
        self.length = length
        skip = self.position - first
        while skip:
            skipped = len(response.read(min(skip, 1 << 20)))
            if not skipped:
                raise ConnectionError("the connection ended on the way to where it had broken")
            skip -= skipped
        return response

    def _place_of(self, response, begin: int) -> tuple[int, int | None]:
        """The byte that a response begins at, and the length of the whole, where it says so."""
        size = response.headers.get("Content-Length", "")
        size = int(size) if size.isdecimal() else None
        if size is None and response.headers.get("Transfer-Encoding") is None and _is_lines(self.url):
            raise OSError(f"{self.url}: the server does not say how long the file is, and lines have no mark of an end")
        if response.status != 206:
            return 0, size
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None:
            # not allowed, but right if the lengths add up
            is_right, total = size is not None and begin + size == self.length, self.length
        else:
            is_right = int(found[1]) == begin and size in (None, int(found[2]) - int(found[1]) + 1)
            total = int(found[3]) if found[3].isdecimal() else self.length
        if not is_right:
            self._has_ranges = False
            raise ConnectionError(f"the server sent another range ({response.headers.get('Content-Range')}) than bytes {begin} and on")
        return begin, total

    def _look_at_pace(self, count: int, seconds: float) -> None:
        """Whoever brings bytes is forgiven earlier failures; whoever hardly does is as good as gone, however often it connects."""
        self._failures = 0 if count else self._failures
        self._brought += count
        self._waited_s += seconds
        if self._brought >= MIN_BYTES:
            self._slow = 0
            self._brought = 0
            self._waited_s = 0.0
        elif self._waited_s > TIMEOUT_S:
            self._slow += 1
            log.info("%s: %d bytes in %.0f s", self.url, self._brought, self._waited_s)
            self._drop()
            if self._slow > self.retries:
                raise OSError(f"{self.url}: gave up: {self._brought} bytes in {self._waited_s:.0f} s, {self._slow} times in a row")
            self._brought = 0
            self._waited_s = 0.0

    def _pause(self, error: Exception) -> None:
        self._drop()
        self._failures += 1
        if self._failures > self.retries:
            raise OSError(f"{self.url}: gave up after {self._failures} failures in a row: {error}") from error
        log.info("%s: %s; trying again (%d of %d)", self.url, error, self._failures, self.retries)
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._failures - 1))
        self._waited_s += pause_s
        time.sleep(pause_s)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        self._drop()
        super().close()
