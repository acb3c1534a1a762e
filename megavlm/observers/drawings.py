"""Drawings on the way: the recipe's prompts, every so many steps, in TensorBoard and ``RUN/samples/``."""

from megavlm.evaluation.sampling import draw_images
from megavlm.randomness import Purpose, integer_seed
from megavlm.system.pictures import save_grid
from megavlm.training.observers import Observer, Training


class Drawings(Observer):
    """All ranks draw, rank 0 writes."""

    name = "draw"

    def attach(self, training: Training) -> None:
        self.training = training

    def after_step(self, num_steps: int) -> None:
        training = self.training
        parts, config = training.parts, training.parts.config
        every = config.monitor.sample_every_steps
        if not every or (num_steps % every and num_steps != config.optimizer.num_steps):
            return
        prompts = config.monitor.sample_prompts
        training.engine.eval()
        codes = draw_images(
            training.engine,
            parts.encoder,
            prompts,
            parts.inference_costing,
            training.world.device,
            integer_seed(config.seed, Purpose.DRAWING, num_steps),
            config.evaluation.temperature,
            config.evaluation.top_k,
            config.evaluation.guidance,
        )
        training.engine.train()
        if training.writer:
            images = parts.image_tokenizer.decode(codes)
            training.writer.add_images("samples", images, num_steps, dataformats="NHWC")
            save_grid(images, prompts, training.folder.samples / f"step-{num_steps:08d}.png", title=f"step {num_steps}")
            training.writer.flush()
