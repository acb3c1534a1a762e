"""The page of `megavlm serve`: a chat in which one asks about images and lets draw. The library is gradio.

Letters: H and W pixels, C colours.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports] (the extra `serve`)
import numpy as np
from fastapi import FastAPI

from megavlm.errors import MegavlmError
from megavlm.evaluation.prompts import Part
from megavlm.system.pictures import png
from megavlm.talk.line import Line
from megavlm.talk.talker import Talker, Writing, random_seed, read_settings
from megavlm.talk.words import read_picture

ASK, DRAW = "ask", "draw"
LEAST_PIXELS = 240
"""Smaller drawings are shown larger, pixel by pixel."""
# fonts that every machine has: those of gradio's themes would be fetched
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}

STYLE = 'button[aria-label="Share"] {display: none}'
"""It would upload the conversation."""


class Page:
    """Turns what is typed into requests, and what comes back into messages.

    Args:
        talker: The model.
        line: Its requests, also those of others.
        folder: For the pictures of the chat.
    """

    def __init__(self, talker: Talker, line: Line, folder: Path):
        self.talker = talker
        self.line = line
        self.folder = folder

    def respond(self, typed: dict, mode: str, chat: list, said: list[Part], *settings: Any) -> Iterator[tuple]:
        """What the chat shows and what was said, step by step.

        Args:
            typed: `text` and the paths of `files`.
            mode: Ask or draw.
            chat: Messages so far.
            said: Texts and images so far, in order.
            settings: Whether these stand before the request; then as `widgets` has them.
        """
        remembers, guidance, temperature, top_k, warmth, max_tokens, seed = settings
        seed = seed.strip() or random_seed()
        text = typed["text"].strip()
        try:
            if not text:
                raise MegavlmError(f"there is nothing to {mode}\n  do:    write a {'question' if mode == ASK else 'description'}")
            parts = [*(said if remembers else []), *(read_picture(Path(path)) for path in typed["files"]), text]
            chat = [*chat, *(_message("user", {"path": path}) for path in typed["files"]), _message("user", text)]
            if mode == ASK:
                writing = read_settings(Writing, {"temperature": warmth, "max_tokens": max_tokens, "seed": seed})
                replies = self._answers(parts, writing)
            else:
                drawing = self.talker.drawing_settings(guidance=guidance, temperature=temperature, top_k=top_k, seed=seed)
                replies = self._sketches(parts, drawing)
            for shown, part in replies:
                yield [*chat, _message("assistant", shown)], [*parts, part]
        except MegavlmError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _answers(self, parts: list[Part], writing: Writing) -> Iterator[tuple[str, Part]]:
        request = self.talker.answer(parts, writing)
        for answer in self.line.run(lambda: request):
            cut = f" … *(cut after {answer.num_tokens} tokens)*" if answer.ended == "length" else ""
            yield answer.text + cut, answer.text

    def _sketches(self, parts: list[Part], drawing) -> Iterator[tuple[dict[str, str], Part]]:
        request = self.talker.draw(parts, drawing)
        for sketch in self.line.run(lambda: request):
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".png", delete=False) as file:
                file.write(png(enlarged(sketch.pictures[0])))
            yield {"path": file.name}, sketch.pictures[0]


def mount(app: FastAPI, talker: Talker, line: Line, name: str) -> None:
    """Put the page at the root of an app."""
    folder = Path(tempfile.mkdtemp(prefix="megavlm-"))
    page = Page(talker, line, folder)
    with gr.Blocks(title=f"megavlm: {name}", analytics_enabled=False, fill_height=True, delete_cache=(3600, 3600)) as blocks:
        said = gr.State([])
        with gr.Row():
            with gr.Column(scale=3):
                gr.Markdown(f"### {name}")
                chat = gr.Chatbot(show_label=False, height=520, buttons=["copy"], allow_tags=False)
                with gr.Row():
                    mode = gr.Radio([ASK, DRAW], value=ASK, show_label=False)
                    # off: most models have seen single requests only
                    remembers = gr.Checkbox(False, label="go on from what was said before", elem_id="remembers")
                box = gr.MultimodalTextbox(
                    file_types=["image"],
                    file_count="multiple",
                    show_label=False,
                    placeholder="A question, or what to draw; images with the paper clip",
                )
            with gr.Column(scale=1):
                settings = widgets(talker)
        typed = box.submit(
            page.respond,
            [box, mode, chat, said, remembers, *settings],
            [chat, said],
            concurrency_limit=16,
            show_progress="hidden",
            api_visibility="private",
        )
        typed.success(lambda: None, None, box, api_visibility="private")
        # the basket of the chat
        chat.clear(list, None, said, api_visibility="private")
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        ssr_mode=False,
        footer_links=[],
        allowed_paths=[str(folder)],
        theme=gr.themes.Base(**FONTS),
        css=STYLE,
        enable_monitoring=False,
    )


def widgets(talker: Talker) -> list[Any]:
    """Sliders of the drawing, then of the answers, then the seed."""
    recipe = talker.drawing_settings()
    with gr.Accordion("drawing"):
        guidance = gr.Slider(0, 10, recipe.guidance, step=0.1, label="guidance", info="how closely to follow the text; 1 is as trained")
        temperature = gr.Slider(0.05, 2, recipe.temperature, step=0.05, label="temperature")
        top_k = gr.Slider(0, 100, recipe.top_k, step=1, label="top k", info="0 is all")
    with gr.Accordion("answers"):
        warmth = gr.Slider(0, 2, 0, step=0.05, label="temperature", info="0 takes the most likely token")
        max_tokens = gr.Slider(1, min(talker.longest, 1024), min(64, talker.longest), step=1, label="most tokens")
    seed = gr.Textbox("", label="seed", info="empty: another one every time", elem_id="seed")
    return [guidance, temperature, top_k, warmth, max_tokens, seed]


def enlarged(image_HWC: np.ndarray) -> np.ndarray:
    """A small image, pixel by pixel at least `LEAST_PIXELS` high."""
    factor = max(1, -(-LEAST_PIXELS // len(image_HWC)))
    return image_HWC.repeat(factor, 0).repeat(factor, 1)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
