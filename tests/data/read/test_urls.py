"""Reading over HTTP from a real server that drops connections, from pipes, and through the cache."""

import http.server
import threading
import time
from contextlib import suppress

import pytest

from megavlm.data.read import urls
from megavlm.data.read.shards import read_shard
from megavlm.data.read.urls import Opener
from megavlm.errors import DataError
from tests.data.conftest import ids, pair, write_shard


class Server(http.server.ThreadingHTTPServer):
    """Serves one folder; ``drop_after`` bytes of a response the connection breaks, ``failures`` requests get a 503 first."""

    drop_after, failures, ranges, requests = None, 0, True, 0
    wrong_range, tag, trickle, says_length = None, None, "", True


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.failures:
            server.failures -= 1
            self.send_error(503)
            return
        if self.path == "/circle":
            self.send_response(302)
            self.send_header("Location", "/circle")
            self.end_headers()
            return
        path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, begin = path.read_bytes(), 0
        if server.ranges and (asked := self.headers.get("Range")):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        headers = {"Content-Length": str(len(content) - begin), "ETag": server.tag or str(path.stat().st_mtime_ns)}
        if begin and server.wrong_range:
            headers |= {name: value.format(begin=begin, total=len(content)) for name, value in server.wrong_range.items()}
        if not server.says_length:
            del headers["Content-Length"]
        self.send_response(206 if begin else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.trickle == "head":
            self.flush_headers()
            self._trickle(b"X-Slow: " + b"x" * 10_000)
            return
        self.end_headers()
        if server.trickle == "body":
            self._trickle(content[begin:])
            return
        end = len(content) if server.drop_after is None else begin + server.drop_after
        if server.trickle == "drops":
            time.sleep(0.15)
            end = begin + 1
        self.wfile.write(content[begin:end])

    def _trickle(self, content):
        with suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(urls, "FIRST_PAUSE_S", 0.001)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.folder = tmp_path / "served"
        server.folder.mkdir()
        write_shard(server.folder / "a.tar", [(str(i), pair("generation", 3)) for i in range(20)])
        server.url = f"http://127.0.0.1:{server.server_port}/a.tar"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read(url, **options):
    return list(read_shard(url, "s", Opener(**options)))


def test_http_is_read_like_a_file(server):
    assert read(server.url) == read(str(server.folder / "a.tar")) and server.requests == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_drops_connections_is_read_to_the_end(server, ranges):
    wanted = read(str(server.folder / "a.tar"))
    if ranges:
        server.drop_after = 5000
    else:  # reads from the start again: later connections must get further
        server.ranges, server.drop_after = False, 12_000
        threading.Timer(0.2, setattr, (server, "drop_after", None)).start()
    assert read(server.url, retries=5 if ranges else 1000) == wanted
    assert server.requests > 3 if ranges else server.requests > 1


def test_overload_is_waited_for_and_absence_is_not(server):
    server.failures = 2
    assert len(read(server.url)) == 20
    with pytest.raises(DataError, match="HTTP 404"):
        read(server.url + "x")


def test_giving_up_says_so(server):
    server.failures = 100
    with pytest.raises(DataError, match="gave up after 4 failures") as caught:
        read(server.url, retries=3)
    assert caught.value.shard == server.url and server.requests == 4


def test_a_shard_that_changes_while_it_is_read_is_an_error(server):
    server.drop_after = 6000
    stream = urls._HttpStream(server.url, retries=3)
    stream.read(1000)
    write_shard(server.folder / "a.tar", [(str(i), pair("generation", 4)) for i in range(30)])
    with pytest.raises(OSError, match="has changed"):
        stream.readall()


def test_pipes_are_read_and_their_failures_seen(server):
    path = server.folder / "a.tar"
    assert read(f"pipe:cat {path}") == read(f"file:{path}") == read(str(path))
    with pytest.raises(DataError):
        read("pipe:exit 3")
    with pytest.raises(DataError, match="cut short"):
        read(f"pipe:head -c 3000 {path}")


def test_the_cache_fetches_once_and_keeps_its_limit(server, tmp_path):
    size = (server.folder / "a.tar").stat().st_size
    for name in "bcd":
        (server.folder / f"{name}.tar").write_bytes((server.folder / "a.tar").read_bytes())
    options = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 2.5 * size / 2**30}
    base = server.url.removesuffix("a.tar")
    for name in "aab":
        read(f"{base}{name}.tar", **options)
    assert server.requests == 2
    for name in "aca":  # a was used after b, so b has to go
        read(f"{base}{name}.tar", **options)
    assert server.requests == 3
    read(f"{base}b.tar", **options)
    assert server.requests == 4
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 2 and all(path.suffix == ".shard" for path in kept)


def test_a_fetch_that_fails_leaves_nothing_in_the_cache(server, tmp_path):
    server.drop_after, server.ranges = 2000, False
    with pytest.raises(DataError):
        read(server.url, retries=2, cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_lanes_read_over_http(server, make_factory):
    local = make_factory({"a": {"shards": str(server.folder / "a.tar")}}, num_lanes=1)(0)
    server.drop_after = 9000
    remote = make_factory({"a": {"shards": server.url}}, num_lanes=1)(0)
    assert [ids(next(remote)[0]) for _ in range(3)] == [ids(next(local)[0]) for _ in range(3)]


# --- servers that answer wrongly


WRONG = {
    "another range": {"Content-Range": "bytes 0-99/{total}"},
    "a range of another length": {"Content-Range": "bytes {begin}-{begin}/{total}"},
    "a range that is none": {"Content-Range": "pieces 1 to 2"},
    "several ranges": {"Content-Type": "multipart/byteranges; boundary=x", "Content-Length": "7"},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_a_wrong_range_is_not_appended(server, headers):
    """It is read again from the start instead."""
    wanted = read(str(server.folder / "a.tar"))
    server.drop_after, server.wrong_range = 5000, headers
    stop_dropping = threading.Timer(0.3, setattr, (server, "drop_after", None))
    stop_dropping.start()
    assert read(server.url, retries=10_000) == wanted


def test_a_file_of_another_length_has_changed(server, monkeypatch):
    server.drop_after, server.tag = 6000, "the same"
    stream = urls._HttpStream(server.url, retries=3)
    stream.read(1000)
    write_shard(server.folder / "a.tar", [(str(i), pair("generation", 4)) for i in range(30)])
    with pytest.raises(OSError, match="has changed"):
        stream.readall()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("part", ["head", "body", "drops"])
def test_a_server_that_trickles_is_given_up(server, monkeypatch, part):
    monkeypatch.setattr(urls, "TIMEOUT_S", 0.4)
    server.trickle = part
    with pytest.raises(DataError, match="gave up"):
        read(server.url, retries=2)


def test_redirects_in_a_circle_are_an_error(server):
    with pytest.raises(DataError, match="HTTP 30"):
        read(server.url.replace("a.tar", "circle"))


def test_lines_of_unknown_length_are_refused_because_a_cut_could_not_be_seen(server):
    (server.folder / "a.jsonl").write_text('{"text": "a"}\n' * 9)
    assert len(read(server.url.replace("a.tar", "a.jsonl"))) == 9
    server.says_length = False
    assert len(read(server.url)) == 20, "a tar has a mark of its end"
    with pytest.raises(DataError, match="does not say how long"):
        read(server.url.replace("a.tar", "a.jsonl"))


def test_a_broken_copy_in_the_cache_is_fetched_again(server, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    whole = (server.folder / "a.tar").read_bytes()
    (server.folder / "a.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match="cut short"):
        read(server.url, **options)
    (server.folder / "a.tar").write_bytes(whole)
    assert len(read(server.url, **options)) == 20
    (copy,) = (tmp_path / "cache").glob("*.shard")
    copy.write_bytes(b"")
    with pytest.raises(DataError, match="cut short"):
        read(server.url, **options)
    assert len(read(server.url, **options)) == 20
