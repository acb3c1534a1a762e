"""Servers that drop, trickle, lie about ranges and lengths, or answer garbage: the shard as it is, or a message with its place."""

import http.server
import random
import threading
from contextlib import suppress

import pytest

from megavlm.data.read import urls
from megavlm.data.read.shards import read_shard
from megavlm.data.read.urls import Opener
from megavlm.errors import DataError
from tests.data.conftest import pair, write_shard
from tests.fuzz.harness import is_documented


class Handler(http.server.BaseHTTPRequestHandler):
    """Every answer is right in most things."""

    def do_GET(self):
        chance, content = self.server.chance, self.server.content
        begin = 0
        if (asked := self.headers.get("Range")) and chance.random() < 0.8:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        wrong = chance.random() < 0.3
        if wrong and chance.random() < 0.3:
            self.send_response(chance.choice((302, 404, 416, 500, 503, 204, 206, 999)))
            self.send_header("Location", chance.choice(("/a.tar", "http://", "file:///etc/passwd", "//\0")))
            self.end_headers()
            return
        headers = {"Content-Length": str(len(content) - begin), "Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        if wrong:
            name = chance.choice(list(headers))
            headers[name] = chance.choice(
                ("", "-5", "x", "bytes 0-9/10", f"bytes {begin + 1}-{len(content)}/*", str(10**30), "bytes */5", "7")
            )
        self.send_response(206 if begin else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        end = chance.choice((len(content), len(content), begin + chance.randrange(1, 9000)))
        with suppress(OSError):
            self.wfile.write(content[begin:end])

    def log_message(self, *_):
        pass


def try_servers(tmp_path, monkeypatch, seed: int, number: int) -> str:
    monkeypatch.setattr(urls, "FIRST_PAUSE_S", 0.0001)
    monkeypatch.setattr(urls, "TIMEOUT_S", 1)
    write_shard(tmp_path / "a.tar", [(str(i), pair("generation", 3)) for i in range(20)])
    wanted, counts = list(read_shard(str(tmp_path / "a.tar"))), {"read": 0, "refused": 0}
    for case in range(number):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.chance, server.content = random.Random(f"{seed} {case}"), (tmp_path / "a.tar").read_bytes()
            threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
            url, found = f"http://127.0.0.1:{server.server_port}/a.tar", []
            cache = str(tmp_path / "cache") if case % 2 else None
            try:
                for sample in read_shard(url, "s", Opener(retries=4, cache_dir=cache)):
                    found.append(sample)
                assert found == wanted, f"seed {seed}, server {case}: other samples than the shard has"
                counts["read"] += 1
            except DataError as error:
                assert error.shard == url and is_documented(str(error)), error
                assert found == wanted[: len(found)], f"seed {seed}, server {case}: torn samples are passed on"
                counts["refused"] += 1
            server.shutdown()
    return f"{number} hostile servers, seed {seed}: {counts}"


@pytest.mark.timeout(120)
def test_thirty_hostile_servers(tmp_path, monkeypatch):
    print(try_servers(tmp_path, monkeypatch, 1, 30))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_hundred_hostile_servers(tmp_path, monkeypatch):
    print(try_servers(tmp_path, monkeypatch, 2, 500))
