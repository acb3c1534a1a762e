"""Losses of held-out samples while a run trains: by task, by source, and as the training weighs them.

Samples are read once, when the run starts, and laid into packs that never change. The ranks share the packs; each calls the model equally
often. Measured along the route that ``evaluation.route`` names. Tested by `tests/observers/test_validation.py`.
"""

import logging

import numpy as np
import torch

from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Pack, build_pack
from megavlm.data.pack.sources import make_sources
from megavlm.data.tools.tokenize import check_codes
from megavlm.evaluation.held_out import encode_held_out, read_held_out
from megavlm.routing.tasks import TASKS
from megavlm.training.observers import Observer, Training

log = logging.getLogger(__name__)


class Validation(Observer):
    """Measures every ``validation.every_steps`` and after the last step; what it finds is kept with a checkpoint of the same step."""

    name = "validate"

    def attach(self, training: Training) -> None:
        self.training = training
        parts, config = training.parts, training.parts.config
        self.packs: list[tuple[int, Pack]] = []
        """(number of the held-out source, pack)"""
        self.names = list(config.validation.sources)
        for number, source in enumerate(make_sources(config.validation.sources)):
            check_codes(list(source.urls), parts.image_tokenizer)
            samples = read_held_out(source, config.validation.max_samples)
            encoded = encode_held_out(samples, parts.encoder, config.data.sample_tokens)
            self.packs += [(number, pack) for pack in self._packs_of(encoded)]

    def _packs_of(self, samples: list[EncodedSample]) -> list[Pack]:
        """Packs of at most ``data.pack_tokens`` tokens, in the order of the samples."""
        config, groups, room = self.training.parts.config.data, [], 0
        for sample in samples:
            if sample.num_tokens > room:
                groups.append([])
                room = config.sample_tokens
            groups[-1].append(sample)
            room -= sample.num_tokens
        costing, num_sources = self.training.parts.inference_costing, len(config.sources)
        return [build_pack(group, costing, num_sources, lane=0, step=0, seed=0) for group in groups]

    def after_step(self, num_steps: int) -> None:
        config = self.training.parts.config
        self.training.metrics.clear()
        if not self.packs or (num_steps % config.validation.every_steps and num_steps != config.optimizer.num_steps):
            return
        losses_st, labels_st = self._measure()
        values = _values(losses_st, labels_st, self.names, [config.loss.task_weights.get(task, 1.0) for task in TASKS])
        self.training.metrics.update(values)
        self.training.board.scalars(values, num_steps)
        tasks = "  ".join(f"{task} {values[f'validation/{task}']:.4f}" for task in TASKS if f"validation/{task}" in values)
        log.info("step %d  held out: loss %.4f  %s", num_steps, values["validation/loss"], tasks)

    @torch.no_grad()
    def _measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of cross-entropy and numbers of labels, by held-out source and task, over all ranks."""
        world, engine = self.training.world, self.training.engine
        losses_st, labels_st = np.zeros((len(self.names), len(TASKS))), np.zeros((len(self.names), len(TASKS)))
        engine.eval()
        try:
            for first in range(0, len(self.packs), world.size):
                # every rank calls the model (P7): where packs are used up, on the first one, which then does not count
                is_own = first + world.rank < len(self.packs)
                number, pack = self.packs[first + world.rank if is_own else 0]
                sums_G = engine(pack.to(world.device))
                if is_own:
                    losses_st[number] += sums_G[: engine.module.num_groups].double().cpu().numpy().reshape(-1, len(TASKS)).sum(0)
                    labels_st[number] += pack.task_labels
        finally:
            engine.train()
        both = world.sum(np.stack([losses_st, labels_st])).cpu().numpy()
        return both[0], both[1]


def _values(losses_st: np.ndarray, labels_st: np.ndarray, names: list[str], weights: list[float]) -> dict[str, float]:
    """TensorBoard tag → mean cross-entropy per labelled token; ``validation/loss`` is the training's weighted sum over the tasks."""
    values, total = {}, 0.0
    for t, task in enumerate(TASKS):
        if labels_st[:, t].sum():
            values[f"validation/{task}"] = float(losses_st[:, t].sum() / labels_st[:, t].sum())
            total += weights[t] * values[f"validation/{task}"]
        for s, name in enumerate(names):
            if labels_st[s, t] and len(names) > 1:
                values[f"validation_by_source/{name}/{task}"] = float(losses_st[s, t] / labels_st[s, t])
    return values | {"validation/loss": total}
