"""The training loop: fetch the step's packs, normalise, forward and backward per pack, step, report.

The loss of a step is ``sum over tasks of weight * (sum of cross-entropy / number of labelled tokens)``, both sums over all
packs of the step on all ranks, plus the auxiliary loss of learned gates per image token. The numbers are known from the packs before the first forward pass, so the gradient does not depend
on how packs are split over ranks and micro-batches (P8).
"""

import json
import logging
import time

import deepspeed
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from megavlm import build
from megavlm.config import RunConfig, find_resource
from megavlm.data.loader import Loader, lanes_of
from megavlm.data.sample import TASKS
from megavlm.engine.checkpoint import Checkpointer, complete_checkpoints
from megavlm.engine.distributed import World
from megavlm.engine.run import RunFolder
from megavlm.engine.schedule import learning_rate
from megavlm.errors import MegavlmError
from megavlm.evaluation.sampling import draw_images
from megavlm.monitor.metrics import Meters
from megavlm.monitor.pictures import save_grid
from megavlm.randomness import Purpose, integer_seed

log = logging.getLogger(__name__)


class Trainer:
    """A run: everything it needs, made from its configuration; ``run`` trains to the end.

    Called by all ranks together. Goes on from the newest complete checkpoint in the run folder, if there is one.

    Args:
        config: The recipe.
        world: The processes.
    """

    def __init__(self, config: RunConfig, world: World):
        self.world = world
        lanes = lanes_of(world.rank, world.size, config.data.num_lanes)
        self.folder = RunFolder(config.run_dir)
        self.config = config = self.folder.prepare(config, world)
        self.encoder = build.build_encoder(config, unconditional_ratio=0.0)
        # the same weights on every rank: DeepSpeed keeps rank 0's, but a frozen seed costs nothing
        torch.manual_seed(config.seed)
        causal_lm = build.build_causal_lm(config, self.encoder.vocabulary)
        self.plan = build.build_routing_plan(config, causal_lm.config.num_hidden_layers)
        self.engine = _start_engine(build.build_backbone(config, causal_lm), config, world)
        self.checkpointer = Checkpointer(self.folder.checkpoints, world, config.checkpoint.keep_last)
        self.step, states = 0, {}
        if existing := world.gather(complete_checkpoints(self.folder.checkpoints))[0]:
            state = self.checkpointer.restore(existing[-1], self.engine)
            self.step, states = state["step"], {lane: state["lanes"][str(lane)] for lane in lanes}
            log.info("resuming after step %d from %s", self.step, existing[-1])
        data = config.data
        self.loader = Loader(
            build.LaneFactory(config), lanes, states, data.num_workers, data.prefetch_packs, world.device.type == "cuda"
        )
        self.states = states
        self.meters = Meters(world, list(data.sources), self.plan.bounds)
        weights = config.loss.task_weights
        self.loss_weights = torch.tensor(
            [*(weights.get(task, 1.0) for task in TASKS), config.loss.gate_weight], device=world.device
        )
        self.writer = SummaryWriter(self.folder.tensorboard, purge_step=self.step + 1) if world.is_main else None

    def run(self) -> None:
        """Train until the last step."""
        config, num_steps = self.config, self.config.optimizer.num_steps
        if self.world.is_main:
            log.info(self._description())
        begin = time.perf_counter()
        for step in range(self.step, num_steps):
            gradient_norm = self.train_step(step)
            self.step = step + 1
            if self.step % config.monitor.log_every_steps == 0 or self.step == num_steps:
                self._report(step, gradient_norm)
            every = config.monitor.sample_every_steps
            if every and (self.step % every == 0 or self.step == num_steps):
                self._draw()
            if self.step % config.checkpoint.every_steps == 0 or self.step == num_steps:
                path = self.checkpointer.save(self.step, self.engine, self.states)
                log.info("checkpoint %s", path)
        if self.writer:
            self.writer.close()
            log.info("done: %d steps, %.0f s in this session", num_steps, time.perf_counter() - begin)

    def train_step(self, step: int) -> float:
        """One optimizer step on the next packs of this rank's lanes; returns the gradient norm before clipping."""
        config, engine = self.config, self.engine
        begin = time.perf_counter()
        packs, self.states = next(self.loader)
        self.meters.add_step(time.perf_counter() - begin)
        factor_G = self._loss_factors(packs)
        settings = config.optimizer
        lr = learning_rate(
            step, settings.num_steps, settings.learning_rate, settings.warmup_steps, settings.min_lr_ratio
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        self.learning_rate = lr
        for pack in packs:
            # dropout and the like depend on the pack, not on which rank has it
            torch.manual_seed(integer_seed(config.seed, Purpose.MODULES, pack.step, pack.lane))
            loss_sums_G = engine(pack.to(self.world.device))
            self.meters.add_pack(pack, loss_sums_G[:-1])
            engine.backward((loss_sums_G * factor_G).sum(), scale_wrt_gas=False)
            engine.step()
        forget_gradients(engine)
        return float(engine.get_global_grad_norm())

    def _loss_factors(self, packs: list) -> torch.Tensor:
        """What each of the sums that the backbone gives is multiplied by: float32 ``[num_groups + 1]``."""
        totals = self.world.sum(np.append(sum(p.task_labels for p in packs), sum(p.image_tokens.sum() for p in packs)))
        # DeepSpeed averages gradients over ranks; the loss is normalised over all of them already
        factor = self.world.size * self.loss_weights / totals.clamp(min=1)
        per_group = factor[:-1].repeat(len(self.config.data.sources))
        return torch.cat([per_group, factor[-1:]]).float()

    def _report(self, step: int, gradient_norm: float) -> None:
        values = self.meters.report()
        values["optimizer/learning_rate"] = self.learning_rate
        values["optimizer/gradient_norm"] = gradient_norm
        losses = {task: values[f"loss/{task}"] for task in TASKS if f"loss/{task}" in values}
        if not np.isfinite([*losses.values(), gradient_norm]).all():
            raise MegavlmError(
                f"loss or gradient is not finite at step {step + 1}: {losses}, gradient norm {gradient_norm}\n"
                "  do:    lower optimizer.learning_rate or clip harder, and start again: the newest checkpoint is taken"
            )
        if not self.world.is_main:
            return
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step + 1)
        left_s = values["time/step_s"] * (self.config.optimizer.num_steps - self.step)
        log.info(
            "step %d/%d  %s  lr %.1e  norm %.2f  %.0f tokens/s  flops %.0f%%  data wait %.0f%%  left %d:%02d",
            self.step,
            self.config.optimizer.num_steps,
            "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items()),
            self.learning_rate,
            gradient_norm,
            values["throughput/tokens_per_s"],
            100 * values["routing/flops_share"],
            100 * values["time/data_wait_share"],
            *divmod(int(left_s), 60),
        )

    def _draw(self) -> None:
        """Draw the recipe's prompts and put them into TensorBoard and ``samples/``. All ranks draw, one writes."""
        config, settings, prompts = self.config, self.config.evaluation, self.config.monitor.sample_prompts
        self.engine.eval()
        codes = draw_images(
            self.engine,
            self.encoder,
            prompts,
            build.inference_costing(config, self.engine.module.causal_lm.config),
            self.world.device,
            integer_seed(config.seed, Purpose.DRAWING, self.step),
            settings.temperature,
            settings.top_k,
            settings.guidance,
        )
        self.engine.train()
        if self.writer:
            images = self.encoder.image_tokenizer.decode(codes)
            self.writer.add_images("samples", images, self.step, dataformats="NHWC")
            save_grid(images, prompts, self.folder.samples / f"step-{self.step:08d}.png", title=f"step {self.step}")
            self.writer.flush()

    def _description(self) -> str:
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        return (
            f"{numel / 1e6:.2f}M parameters, ZeRO-3 on {self.world.size} x {self.world.device.type}, "
            f"{self.config.data.num_lanes} packs of up to {self.config.data.pack_tokens} tokens per step, "
            f"{self.plan.num_stages} stages; run folder {self.config.run_dir}"
        )


def forget_gradients(engine) -> None:
    """Forget the gradients of the step that was just taken.

    DeepSpeed's stage 3 (0.16 to at least 0.19.8) leaves the last gradient of a parameter in its buffer and applies it again in steps
    where the parameter gets none, such as steps without the only task that uses it.
    """
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def _start_engine(backbone: torch.nn.Module, config: RunConfig, world: World):
    """DeepSpeed's engine around the backbone, with AdamW in two groups, matrices with weight decay and the rest without."""
    settings = config.optimizer
    named = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for _, p in named if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"name": "no_decay", "params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    document = json.loads(find_resource("ds_configs", config.engine.deepspeed, ".json").read_text())
    bfloat16 = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and world.device.type == "cuda")
    document |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.num_lanes // world.size,
        # written always: the default has changed between versions of DeepSpeed
        "gradient_clipping": settings.gradient_clipping,
        "bf16": {"enabled": bfloat16},
    }
    engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=document)
    return engine
