"""An endpoint for clients of OpenAI: chat with images, drawings, the list of models.

    GET  /v1/models
    POST /v1/chat/completions     messages with texts and images as data: URLs; streams if asked
    POST /v1/images/generations   PNGs as base64

Roles are not told apart: the turns follow each other as in training. Addresses of images are not fetched. What would be left unread is
refused by name.
"""

import base64
import binascii
import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from megavlm.data.read.pixels import decode_pixels
from megavlm.errors import MegavlmError
from megavlm.evaluation.prompts import Part
from megavlm.system.pictures import png
from megavlm.talk.line import Line
from megavlm.talk.talker import Answer, Talker, Writing, last, random_seed, read_settings

MODEL = "megavlm"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = MODEL
    """There is one: any name means it."""
    n: Annotated[int, Field(ge=1, le=64)] = 1
    seed: int | None = None
    """By default another one every time."""
    user: str | None = None
    """Read by nobody."""


class ImageUrl(BaseModel):
    """Where an image is; `detail` changes nothing."""

    url: str
    detail: str = "auto"


class Piece(BaseModel):
    """A text or an image of a message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    def part(self) -> Part:
        """Raises MegavlmError for an image that cannot be used."""
        if self.type == "text" and self.text is not None:
            return self.text
        if self.type == "image_url" and self.image_url is not None:
            return image_of(self.image_url.url)
        raise MegavlmError(f"a piece of type {self.type} has no {self.type}\n  do:    add it")


class Message(BaseModel):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Piece]

    def parts(self) -> list[Part]:
        """Texts and images in order."""
        return [self.content] if isinstance(self.content, str) else [piece.part() for piece in self.content]


class ChatBody(_Body):
    """What `POST /v1/chat/completions` takes."""

    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    n: Literal[1] = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0


class ImageBody(_Body):
    """What `POST /v1/images/generations` takes; the recipe's way to draw by default."""

    prompt: str
    size: str = "auto"
    """Only the size that the model draws."""
    response_format: Literal["b64_json"] = "b64_json"
    temperature: float | None = None
    top_k: int | None = None
    guidance: float | None = None


def image_of(url: str) -> Any:
    """The image in a data: URL, uint8 ``[H, W, 3]``.

    Raises:
        MegavlmError: For another address, and for what is no image.
    """
    head, comma, content = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise MegavlmError(f"an image is given as {url[:60]!r}\n  do:    send it as data:image/png;base64,…: nothing is fetched")
    try:
        return decode_pixels("the image", base64.b64decode(content, validate=True))
    except binascii.Error as error:
        raise MegavlmError(f"an image is not base64: {error}\n  do:    send it as data:image/png;base64,…") from error


def make_app(talker: Talker, line: Line, name: str) -> FastAPI:
    """The endpoint around a model.

    Args:
        talker: The model.
        line: Its requests, also those of others.
        name: Its name in the list of models.
    """
    app = FastAPI(title="megavlm", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    @app.exception_handler(MegavlmError)
    def mistake(_request: Request, error: MegavlmError) -> JSONResponse:
        return _refusal(str(error))

    @app.exception_handler(RequestValidationError)
    def misfit(_request: Request, error: RequestValidationError) -> JSONResponse:
        mistakes = (f"{'.'.join(str(place) for place in m['loc'][1:])}: {m['msg']}" for m in error.errors())
        return _refusal("; ".join(mistakes) + "\n  do:    correct what is named; see docs/talk.md")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": MODEL}]}

    @app.post("/v1/chat/completions")
    def chat(body: ChatBody) -> Any:
        parts = [part for message in body.messages for part in message.parts()]
        given = {"temperature": body.temperature, "top_k": body.top_k, "seed": _seed(body)}
        if most := body.max_completion_tokens or body.max_tokens:
            given["max_tokens"] = most
        writing = read_settings(Writing, given)
        request = talker.answer(parts, writing)
        answers = line.run(lambda: request)
        if body.stream:
            return StreamingResponse(_events(answers, name), media_type="text/event-stream")
        answer = last(answers)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}, "finish_reason": answer.ended}
        return _completion("chat.completion", name, choice) | {"usage": {"completion_tokens": answer.num_tokens}}

    @app.post("/v1/images/generations")
    def images(body: ImageBody) -> Any:
        given = {"num": body.n, "seed": _seed(body), "temperature": body.temperature, "top_k": body.top_k, "guidance": body.guidance}
        request = talker.draw([body.prompt], talker.drawing_settings(**{key: value for key, value in given.items() if value is not None}))
        if body.size not in ("auto", size := "{}x{}".format(*talker.picture_size)):
            raise MegavlmError(f"the model draws {size}, not {body.size}\n  do:    give size auto")
        pictures = last(line.run(lambda: request)).pictures
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(png(picture)).decode()} for picture in pictures]}

    return app


def _seed(body: _Body) -> int:
    return random_seed() if body.seed is None else body.seed


def _refusal(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, 400)


def _completion(kind: str, name: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"chatcmpl-{random_seed()}", "object": kind, "created": int(time.time()), "model": name, "choices": [choice]}


def _events(answers: Iterator[Answer], name: str) -> Iterator[str]:
    """Server-sent events: what is new in every step."""
    shown, common = "", _completion("chat.completion.chunk", name, {})
    for answer in answers:
        delta = {"role": "assistant"} if not shown else {}
        choice = {"index": 0, "delta": delta | {"content": answer.text[len(shown) :]}, "finish_reason": answer.ended or None}
        yield f"data: {json.dumps(common | {'choices': [choice]})}\n\n"
        shown = answer.text
    yield "data: [DONE]\n\n"
