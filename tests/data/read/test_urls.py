"""Reading over HTTP from a real server that drops connections, from pipes, and through the cache."""

import http.server
import threading

import pytest

from megavlm.data.read import urls
from megavlm.data.read.shards import read_shard
from megavlm.data.read.urls import Opener
from megavlm.errors import DataError
from tests.data.conftest import ids, pair, write_shard


class Server(http.server.ThreadingHTTPServer):
    """Serves one folder; ``drop_after`` bytes of a response the connection breaks, ``failures`` requests get a 503 first."""

    drop_after, failures, ranges, requests = None, 0, True, 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.failures:
            server.failures -= 1
            return self.send_error(503)
        path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        content, begin = path.read_bytes(), 0
        if server.ranges and (asked := self.headers.get("Range")):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("ETag", str(path.stat().st_mtime_ns))
        self.end_headers()
        end = len(content) if server.drop_after is None else begin + server.drop_after
        self.wfile.write(content[begin:end])

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
