"""Drawings during training: the recipe's prompts, every so many steps, in TensorBoard and ``RUN/samples/``.

Tested by `tests/distributed/test_training.py`.
"""

import numpy as np

from megavlm.config import RunConfig
from megavlm.evaluation.sampling import draw_images
from megavlm.randomness import Purpose, integer_seed
from megavlm.system.harmless import harmless
from megavlm.system.pictures import save_grid
from megavlm.training.observers import Observer, Training


def is_sampling_due(config: RunConfig, num_steps: int) -> bool:
    """Whether it is time for drawings and the like: every so many steps, and after the last one."""
    every = config.monitor.sample_every_steps
    return every is not None and (num_steps % every == 0 or num_steps == config.optimizer.num_steps)


class Drawings(Observer):
    """All ranks draw, rank 0 writes."""

    name = "draw"

    def attach(self, training: Training) -> None:
        self.training = training

    def after_step(self, num_steps: int) -> None:
        config = self.training.parts.config
        if not config.monitor.sample_prompts or not is_sampling_due(config, num_steps):
            return
        codes = self._draw(num_steps)
        if self.training.world.is_main:
            with harmless(f"the drawings of step {num_steps}"):
                self._show(codes, num_steps)

    def _draw(self, num_steps: int) -> np.ndarray:
        """Codes of an image per prompt, ``[N, height, width]``. Called by all ranks together: every layer is gathered."""
        training, config = self.training, self.training.parts.config
        training.engine.eval()
        try:
            return draw_images(
                training.engine,
                training.parts.encoder,
                config.monitor.sample_prompts,
                training.parts.inference_costing,
                device=training.world.device,
                seed=integer_seed(config.seed, Purpose.DRAWING, num_steps),
                temperature=config.evaluation.temperature,
                top_k=config.evaluation.top_k,
                guidance=config.evaluation.guidance,
                guidance_costing=training.parts.guidance_costing,
                batch_tokens=config.evaluation.batch_tokens,
            )
        finally:
            training.engine.train()

    def _show(self, codes: np.ndarray, num_steps: int) -> None:
        training = self.training
        images = training.parts.image_tokenizer.decode(codes)
        picture = training.folder.samples / f"step-{num_steps:08d}.png"
        save_grid(images, training.parts.config.monitor.sample_prompts, picture, title=f"step {num_steps}")
        # with their prompts
        training.board.picture("samples", picture, num_steps)
