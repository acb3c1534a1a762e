"""The route as a picture: which tokens of a real image are active in which layer, every so many steps.

An image that is read and one that is drawn are taken from the step's first pack. What the device decides (gates, merging, rankings) is
seen as it was: the rows come from the forward pass itself. Nothing that is trained changes.

Letters: L layers, P tokens of an image, h and w rows and columns of codes. Tested by `tests/observers/test_window.py`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from megavlm.data.pack.pack import Pack
from megavlm.observers.drawings import is_sampling_due
from megavlm.routing.tasks import TASKS, Task
from megavlm.system.harmless import harmless
from megavlm.system.pictures import plain, pyplot, save_figure
from megavlm.training.observers import Observer, Training


@dataclass(frozen=True)
class Shown:
    """An image of a pack."""

    task: int
    name: str
    """Key of its sample."""
    rows_P: np.ndarray
    """Rows of its tokens in the pack."""
    codes_P: np.ndarray


class Routes(Observer):
    """Every rank watches a pack of its own, rank 0 shows its."""

    name = "show routes"

    def attach(self, training: Training) -> None:
        self.training = training
        self._seen: tuple[list[Shown], np.ndarray] | None = None

    def around_pack(self, step: int, number: int, pack: Pack) -> AbstractContextManager:
        if number or not self.training.world.is_main or not is_sampling_due(self.training.parts.config, step + 1):
            return nullcontext()
        return self._watching(pack)

    @contextmanager
    def _watching(self, pack: Pack) -> Iterator[None]:
        backbone = self.training.engine.module
        is_active_LT = np.ones((pack.route.stages[-1].end_layer, pack.num_tokens), bool)
        before = backbone.observe

        def observe(layer, active, *rest):
            *_, context = rest
            # rows that attend but skip the MLP, or only give keys and values, do not count
            whole, rows = context.parts.mlp_P, active
            if whole is not None:
                rows = whole if active is None else active.index_select(0, whole)
            if rows is not None:
                is_active_LT[layer] = False
                is_active_LT[layer, rows.cpu().numpy()] = True
            if before is not None:
                before(layer, active, *rest)

        backbone.observe = observe
        try:
            yield
        finally:
            backbone.observe = before
        vocabulary = self.training.parts.vocabulary
        self._seen = images_of(pack, vocabulary.first_code, vocabulary.end_code), is_active_LT

    def after_step(self, num_steps: int) -> None:
        if self._seen is None:
            return
        (images, is_active_LT), self._seen = self._seen, None
        path = self.training.folder.samples / f"route-{num_steps:08d}.png"
        if images:
            with harmless(f"the picture {path}"):
                self._draw(images, is_active_LT, path, num_steps)
                self.training.board.picture("route", path, num_steps)

    def _draw(self, images: list[Shown], is_active_LT: np.ndarray, path, num_steps: int) -> None:
        tokenizer = self.training.parts.image_tokenizer
        h, w = tokenizer.height, tokenizer.width
        figure, axes = pyplot.subplots(
            len(images), 3, figsize=(11, 2.6 * len(images) + 0.4), squeeze=False, layout="constrained", width_ratios=[1, 1.25, 3]
        )
        for (picture, grid, layers), shown in zip(axes, images):
            is_active_LP = is_active_LT[:, shown.rows_P]
            is_grid = len(shown.rows_P) == h * w
            picture.axis("off")
            picture.set_title(plain(f"{TASKS[shown.task]}: {shown.name}", 24, 2), fontsize=8)
            if is_grid:
                picture.imshow(tokenizer.decode(shown.codes_P.reshape(1, h, w))[0], interpolation="nearest", vmin=0, vmax=255)
                drawn = grid.imshow(is_active_LP.sum(0).reshape(h, w), cmap="viridis", vmin=0, vmax=len(is_active_LP))
                figure.colorbar(drawn, ax=grid, shrink=0.8)
            grid.axis("off")
            grid.set_title("layers that each token goes through", fontsize=8)
            layers.imshow(is_active_LP, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1.3)
            layers.set_title(f"goes through all of a layer (dark): {is_active_LP.mean():.0%} of layers x tokens", fontsize=8)
            layers.set_xlabel("token of the image, row by row", fontsize=8)
            layers.set_ylabel("layer", fontsize=8)
        figure.suptitle(f"the route at step {num_steps}", fontsize=10)
        save_figure(figure, path)


def images_of(pack: Pack, first_code: int, size: int) -> list[Shown]:
    """The first image that is read and the first that is drawn, if the pack has them."""
    tokens_T = pack.tokens_T.numpy()
    is_code_T = (tokens_T >= first_code) & (tokens_T < size)
    found: dict[int, Shown] = {}
    begin = 0
    for length, task, key in zip(pack.sequences.lengths, pack.tasks, pack.keys):
        rows = begin + np.flatnonzero(is_code_T[begin : begin + length])
        begin += length
        if len(rows) and task in (Task.UNDERSTANDING, Task.GENERATION) and task not in found:
            ends = np.flatnonzero(np.diff(rows) > 1)
            rows_P = rows[: ends[0] + 1] if len(ends) else rows
            found[task] = Shown(task, key, rows_P, tokens_T[rows_P] - first_code)
    return [found[task] for task in sorted(found)]
