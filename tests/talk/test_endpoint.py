"""The endpoint over real HTTP: chat, streamed and whole, drawings, refusals, and that a reader who leaves holds up nobody."""

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from itertools import count

import numpy as np
import pytest
import uvicorn
from PIL import Image

from megavlm.errors import MegavlmError
from megavlm.parts.trained import load_trained
from megavlm.talk.endpoint import make_app
from megavlm.talk.line import Line
from megavlm.talk.serve import ONLY_FROM_HERE, LocalOnly, listening
from megavlm.talk.talker import Talker, Writing, last
from megavlm.talk.words import read_picture


@pytest.fixture(scope="module")
def talker(run):
    return Talker(load_trained(run)[0])


@pytest.fixture(scope="module")
def address(talker):
    line = Line()
    app = make_app(talker, line, "runs/mine")
    app.add_middleware(LocalOnly)
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
        line.close()


def call(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Security-Policy"] == ONLY_FROM_HERE
        return response.read().decode()


def question(images, **more):
    url = "data:image/png;base64," + base64.b64encode((images / "0.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit is this?"}]
    return {"model": "any", "messages": [{"role": "user", "content": content}], "max_tokens": 5} | more


def test_chat_whole_and_streamed(address, talker, images):
    expected = last(talker.answer([read_picture(images / "0.png"), "Which digit is this?"], Writing(max_tokens=5)))
    said = json.loads(call(address, "/v1/chat/completions", question(images)))
    assert said["choices"] == [{"index": 0, "message": {"role": "assistant", "content": expected.text}, "finish_reason": "length"}]
    assert said["usage"]["completion_tokens"] == 5
    *events, done = call(address, "/v1/chat/completions", question(images, stream=True)).strip().split("\n\n")
    assert done == "data: [DONE]" and len(events) == 5
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == expected.text
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"] and chunks[0]["delta"]["role"] == "assistant"


def test_several_turns_are_one_conversation(address, talker):
    messages = [{"role": role, "content": text} for role, text in (("user", "A?"), ("assistant", "seven"), ("user", "B?"))]
    said = json.loads(call(address, "/v1/chat/completions", {"messages": messages, "max_tokens": 4}))
    assert said["choices"][0]["message"]["content"] == last(talker.answer(["A?", "seven", "B?"], Writing(max_tokens=4))).text


def test_drawings(address, talker):
    body = {"prompt": "a handwritten seven", "n": 2, "seed": 5, "guidance": 3.0, "size": "8x8"}
    drawn = [json.loads(call(address, "/v1/images/generations", body))["data"] for _ in range(2)]
    assert drawn[0] == drawn[1], "the same seed"
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in drawn[0]]
    expected = last(talker.draw(["a handwritten seven"], talker.drawing_settings(num=2, seed=5, guidance=3.0))).pictures
    assert (np.stack(pictures) == expected).all()
    other = json.loads(call(address, "/v1/images/generations", body | {"seed": None}))["data"]
    assert other != drawn[0]


def test_models(address):
    assert [model["id"] for model in json.loads(call(address, "/v1/models"))["data"]] == ["runs/mine"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("chat/completions", {"messages": []}, "messages: "),
        ("chat/completions", {"messages": [{"role": "user", "content": "a " * 300}]}, "the model is made for 255"),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "tools": []}, "tools: "),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": -1}, "temperature: "),
        ("images/generations", {"prompt": "a seven", "size": "1024x1024"}, "the model draws 8x8"),
        ("images/generations", {"prompt": "a seven", "guidance": -1}, "guidance: "),
        ("images/generations", {"prompt": "a seven", "response_format": "url"}, "response_format: "),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(address, path, body, words):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        call(address, f"/v1/{path}", body)
    error = json.loads(refusal.value.read())["error"]
    assert refusal.value.code == 400 and words in error["message"] and "do:" in error["message"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/a.png", "nothing is fetched"),
        ("data:image/png;base64,%%", "not base64"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read as an image"),
    ],
)
def test_images_that_are_none(address, url, words):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(urllib.error.HTTPError) as refusal:
        call(address, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert words in json.loads(refusal.value.read())["error"]["message"]


def test_requests_run_one_after_another_and_a_reader_who_leaves_holds_up_nobody():
    line, running, most = Line(), [], []

    def request(steps):
        running.append(1)
        for step in steps:
            most.append(len(running))
            time.sleep(0.001)
            yield step
        running.pop()

    left = line.run(lambda: request(count()))
    assert [next(left), next(left)] == [0, 1]
    results = []
    threads = [threading.Thread(target=lambda: results.append(list(line.run(lambda: request(range(9)))))) for _ in range(4)]
    for thread in threads:
        thread.start()
    left.close()
    running.clear()
    for thread in threads:
        thread.join(20)
    assert results == [list(range(9))] * 4 and max(most) == 1
    with pytest.raises(MegavlmError, match="broken"):
        list(line.run(broken))
    assert list(line.run(lambda: request(range(2)))) == [0, 1]
    line.close()


def broken():
    raise MegavlmError("broken")


def test_a_busy_port_is_said():
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(MegavlmError, match=rf"(?s)cannot listen on port {port} of 127.0.0.1: Address already in use.*do:.*--port"):
            listening("127.0.0.1", port)
    with pytest.raises(MegavlmError, match="cannot listen on port 99999"):
        listening("127.0.0.1", 99999)
