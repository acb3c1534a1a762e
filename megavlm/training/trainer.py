"""The training loop: fetch the step's packs, normalise, forward and backward per pack, step, report.

The loss of a step is ``sum over tasks of weight * (sum of cross-entropy / number of labelled tokens)``, both sums over all packs of the
step on all ranks, plus the auxiliary loss of learned gates per image token and that of experts per pack. The numbers are known from the
packs before the first forward pass, so the gradient does not depend on how packs are split over ranks and micro-batches (P8).

Before every micro-batch the ranks agree whether to continue (`megavlm.engine.agreement`). A step that is given up half-way has changed
nothing: the checkpoint written then is that of the step before. Tested by `tests/distributed/test_training.py`.

Letters: G sums that the backbone gives.
"""

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import distributed

from megavlm.data.pack.ahead import copied_ahead
from megavlm.data.pack.lane import COUNTS
from megavlm.data.pack.loader import Loader, lanes_of
from megavlm.data.pack.pack import Pack
from megavlm.data.pack.sources import State, adapt_state
from megavlm.engine.agreement import Wishes
from megavlm.engine.checkpoint import Checkpointer
from megavlm.engine.guard import Guard
from megavlm.engine.partition import make_partitioned
from megavlm.engine.protocol import Engine
from megavlm.engine.signals import REASONS, Wish, end_time_of_job
from megavlm.engine.watchdog import Watchdog
from megavlm.engine.zero import document_of, forget_gradients, gradient_norm, start_engine
from megavlm.engine.zero_sizes import with_sizes
from megavlm.errors import ConfigError
from megavlm.monitor.board import Board
from megavlm.monitor.metrics import Meters
from megavlm.monitor.peaks import described, peak_tflops_here, utilisation
from megavlm.monitor.stragglers import Stragglers
from megavlm.parts.parts import Parts
from megavlm.parts.resolve import keep
from megavlm.randomness import Purpose, integer_seed
from megavlm.routing.tasks import TASKS, TaskName
from megavlm.runs.exits import Exit, LastWord, NotSaved, RunEnded
from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import checkpoints_in, folder_name
from megavlm.runs.status import write_status
from megavlm.system.harmless import harmless
from megavlm.system.world import World, set_timeout
from megavlm.training.forensics import chain, describe_packs, report_path, write_report
from megavlm.training.initial import load_initial_weights
from megavlm.training.observers import Observer, StepView, Training, unharmed

log = logging.getLogger(__name__)


class Trainer:
    """A run; ``run`` trains to the end.

    Called by all ranks together. Goes on from the newest intact checkpoint in the run folder, if there is one.

    Args:
        parts: Of the resolved configuration.
        world: The processes.
        observers: What watches.
    """

    def __init__(self, parts: Parts, world: World, observers: Sequence[Observer] = ()):
        config = parts.config
        self.parts = parts
        self.world = world
        self.observers = observers
        self.folder = RunFolder(config.run_dir)
        self.lanes = lanes_of(world.rank, world.size, config.data.num_lanes)
        self.watchdog = Watchdog(
            self.folder.hangs, world.rank, world.size, faults=config.faults, engine=config.engine, last_word=LastWord(self.folder.path)
        )
        self.checkpointer = Checkpointer(self.folder.checkpoints, world, config.checkpoint)
        self.guard = Guard(config.faults, world.device)
        self.engine = self._build_engine()
        # of the groups that DeepSpeed has made, too
        set_timeout(config.engine.timeout_s)
        self.meters = Meters(
            world, list(config.data.sources), parts.phases.bounds, self.engine.module.recomputed_shares(parts.phases.bounds)
        )
        self.stragglers = Stragglers(world, self.folder.stragglers)
        weights = [config.loss.task_weights.get(task, 1.0) for task in TASKS]
        self.loss_weights = torch.tensor([*weights, config.loss.gate_weight, *parts.balance_weights])
        self.step = 0
        self.states: dict[int, State] = {}
        self.digests = dict.fromkeys(self.lanes, "")
        self.learning_rate = 0.0
        self.peak_tflops = config.monitor.peak_tflops or peak_tflops_here(world.device, next(self.engine.module.parameters()).dtype)
        self._reported: dict[str, float] = {}
        self._restore()
        world.on_main(partial(keep, config, self.folder))
        data = config.data
        pin_memory = world.device.type == "cuda"
        self.loader = Loader(
            parts.make_lane, self.lanes, self.states, data.num_workers, prefetch_packs=data.prefetch_packs, pin_memory=pin_memory
        )
        self.board = Board(self.folder.tensorboard, self.step + 1, world.is_main, config.monitor.writers)
        self.wishes = Wishes(world, self.folder.path, self._needed_s, end_time_of_job())
        self.training = Training(parts, world, self.engine, self.folder, self.board, self.watchdog)
        for observer in observers:
            observer.attach(self.training)

    def _build_engine(self) -> Engine:
        """The model with its first weights, under DeepSpeed."""
        config, parts, device = self.parts.config, self.parts, self.world.device
        bfloat16 = config.model.is_bfloat16(device.type)
        document = document_of(config.engine, config.optimizer, bfloat16=bfloat16, packs_per_rank=len(self.lanes))
        document = with_sizes(document, parts.make_backbone, device)
        torch.manual_seed(config.seed)
        make = partial(parts.make_backbone, compiled=config.model.compiled_on(device.type))
        backbone = make_partitioned(make, document, bfloat16=bfloat16, device=device)
        if config.init_from and not self.world.on_main(partial(checkpoints_in, self.folder.checkpoints)):
            load_initial_weights(config.init_from, backbone.causal_lm, parts.vocabulary, self.world)
        return start_engine(backbone, self.guard, config.optimizer, document, leaf_modules=config.engine.has_leaf_modules(device.type))

    def _restore(self) -> None:
        """Go on from the newest intact checkpoint, if there is one."""
        config, state = self.parts.config, self.checkpointer.restore_newest(self.engine)
        if state is None:
            return
        if len(state["lanes"]) != config.data.num_lanes:  # config.yaml would have said so, had it not been lost
            raise ConfigError(
                f"data.num_lanes: the checkpoint of step {state['step']} has {len(state['lanes'])} lanes, not {config.data.num_lanes}\n"
                "  do:    give the number that the run began with, or another run_dir"
            )
        # the lanes do the same, but in workers, and too late to leave config.yaml as it was
        adapt_state(state["lanes"]["0"], self.parts.sources, config.data.when_sources_change)
        self.step = state["step"]
        self.states = {lane: state["lanes"][str(lane)] for lane in self.lanes}
        self.guard.load_state(state["guard"])
        self.meters.load_state([rank["meters"] for rank in state["ranks"]], state["totals"])
        digests = {lane: digest for rank in state["ranks"] for lane, digest in rank["digests"].items()}
        self.digests = {lane: digests[str(lane)] for lane in self.lanes}
        log.info("resuming after step %d from %s", self.step, self.folder.checkpoints)

    def run(self) -> None:
        """Train until the last step.

        Raises:
            RunEnded: If the run is to end before, with the state saved.
        """
        config, world = self.parts.config, self.world
        num_steps = config.optimizer.num_steps
        if world.is_main:
            log.info(self._description())
        self._write_status("running")
        begin, first = time.perf_counter(), self.step
        # collected at the same steps on all ranks: one that pauses alone holds up all others
        gc.disable()
        for step in range(self.step, num_steps):
            self.watchdog.begin_step(step)
            norm = self.train_step(step)
            if norm is None:
                self._save_and_end()
            self.step = step + 1
            self.watchdog.enter("report")
            self._handle_skipped(self.guard.settle(keep=0 if self.step == num_steps else 1))
            if self.step % config.monitor.log_every_steps == 0 or self.step == num_steps:
                self._report(step, float(norm))
            for observer in self.observers:
                self.watchdog.enter(observer.name)
                with unharmed(observer, self.engine):
                    observer.after_step(self.step)
            self.watchdog.enter("save")
            wish = self.wishes.agree(step_ends=True)
            if self.step % config.checkpoint.every_steps == 0 or self.step == num_steps or wish == Wish.SAVE:
                self.save()
            self.checkpointer.finished()
            if self.step % config.engine.gc_every_steps == 0:
                gc.collect()
            if step == first:
                gc.freeze()
                set_timeout(config.engine.step_timeout_s)
            self.watchdog.end_step()
        self._finish()
        log.info("done: %d steps, %.0f s in this session", num_steps, time.perf_counter() - begin)

    def train_step(self, step: int) -> torch.Tensor | None:
        """One optimizer step on the next packs of this rank's lanes.

        Returns:
            The gradient norm before clipping, on the device; None if the ranks agreed to stop before the step was complete.
        """
        engine = self.engine
        begin = time.perf_counter()
        packs, states = next(self.loader)
        data_wait_s = time.perf_counter() - begin
        self.watchdog.enter("wait for the ranks' data")
        totals = self._loss_totals(packs)
        factor_G = self._loss_factors(totals)
        lr = self.parts.learning_rates.at(step)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        self.learning_rate = lr
        view = StepView(step, packs, factor_G, totals[: len(TASKS)], self._seed_modules)
        for observer in self.observers:
            self.watchdog.enter(observer.name)
            with unharmed(observer, engine):
                observer.before_step(view)
        step_loss = torch.zeros((), device=self.world.device)
        losses, begin_cpu_s = [], time.thread_time()
        for number, (pack, here) in enumerate(copied_ahead(packs, self.world.device)):
            if self.wishes.agree(step_ends=False) > Wish.SAVE:
                return None
            self._seed_modules(pack)
            self.watchdog.enter("forward")
            with ExitStack() as watching:
                for observer in self.observers:
                    watching.enter_context(observer.around_pack(step, number, pack))
                loss_sums_G = engine(here)
            losses.append(loss_sums_G[: engine.module.num_groups].detach())
            loss = (loss_sums_G * factor_G).sum()
            step_loss += loss.detach()
            self.watchdog.enter("backward")
            engine.backward(loss, scale_wrt_gas=False)
            if number == len(packs) - 1:
                self.watchdog.enter("optimizer")
                distributed.all_reduce(step_loss)
                if step in self.parts.phases.first_steps:
                    # layers that have seen a few tokens now see others: the loss jumps, and that is no spike
                    self.guard.begin_anew()
                self.guard.expect(step_loss / self.world.size, partial(gradient_norm, engine))
            engine.step()
        forget_gradients(engine)
        self.guard.end_step(step, (lr, describe_packs(packs, self.states)))
        self.states = states
        # counted now that the step is complete
        self.meters.add_step(data_wait_s)
        for pack, loss_sums_G in zip(packs, losses):
            self.meters.add_pack(pack, loss_sums_G)
            self.digests[pack.lane] = chain(self.digests[pack.lane], pack)
        flops = float(sum(pack.flops.sum() for pack in packs))
        self.stragglers.add_step(flops, data_wait_s, time.thread_time() - begin_cpu_s)
        return gradient_norm(engine)

    def save(self) -> None:
        """Begin a checkpoint of the current state."""
        self._handle_skipped(self.guard.settle(keep=0))
        shared = {"guard": self.guard.state(), "totals": dict(self.meters.totals)}
        of_rank = {"meters": self.meters.state(), "digests": {str(lane): d for lane, d in self.digests.items()}}
        metrics = self._reported | self.training.metrics
        stall_s = self.checkpointer.save(self.step, self.engine, self.states, shared, metrics=metrics, of_rank=of_rank)
        self.board.scalars({"checkpoint/stall_s": stall_s}, self.step)

    def _save_and_end(self) -> NoReturn:
        """Save what there is and leave: the last word of a run that was told to stop."""
        wish = self.wishes.agree(step_ends=False)
        left = "" if self.wishes.left_s is None else f", {self.wishes.left_s:.0f} s are left"
        log.info("%s: saving step %d, which takes about %.0f s%s", REASONS[wish], self.step, self.checkpointer.expected_s, left)
        self.watchdog.enter("last save")
        if self.step:
            self.save()
        code = Exit.INTERRUPTED if wish == Wish.INTERRUPT else Exit.STOPPED
        self._write_status("saving")
        saved = self.checkpointer.close()
        self._close()
        if saved and saved.error and code == Exit.STOPPED:  # who interrupts starts again, from the newest complete one
            raise NotSaved(saved.error)
        if not self.step:
            what = "no step is complete, so there is nothing to save"
        elif saved and saved.error:
            what = "it could not be saved"
        else:
            what = f"it is saved in {self.folder.checkpoints / folder_name(self.step)}"
        raise RunEnded(
            code,
            f"{REASONS[wish]}: ended after step {self.step} of {self.parts.config.optimizer.num_steps}; {what}\n"
            "  do:    give the same command again to go on",
        )

    def _finish(self) -> None:
        saved = self.checkpointer.close()
        if saved and saved.error:
            raise NotSaved(saved.error)
        self._write_status("done")
        self._close()

    def _close(self) -> None:
        gc.enable()
        self.wishes.close()
        self.watchdog.stop()
        self.loader.close()
        self.board.close()

    def _handle_skipped(self, skipped: list) -> None:
        """Tell, keep the packs' names, and end the run when there are too many in a row. The same on all ranks."""
        for bad in skipped:
            lr, packs = bad.context
            all_packs = [pack for rank in self.world.gather(packs) for pack in rank]
            if self.world.is_main:
                path = report_path(self.folder.forensics, bad.step)
                with harmless(str(path)):
                    write_report(path, bad, all_packs, lr)
                log.warning(
                    "step %d was skipped: %s (loss %.4g, gradient norm %.4g); its packs: %s; look at them with"
                    " `megavlm replay %s --step %d`",
                    *(bad.step + 1, bad.reason, bad.loss, bad.gradient_norm, path, self.folder.path, bad.step + 1),
                )
        limit = self.parts.config.faults.max_skipped_in_a_row
        if skipped and self.guard.num_skipped_in_a_row >= limit:
            self.checkpointer.close()
            self._close()
            raise RunEnded(
                Exit.DIVERGED,
                f"{limit} steps in a row were skipped, the last one is step {skipped[-1].step + 1}\n"
                "  do:    look at them with `megavlm replay`; lower optimizer.learning_rate or clip harder, and start again:"
                " the newest checkpoint is taken",
            )

    def _needed_s(self) -> float:
        """From now to a complete checkpoint: one under way, one more, and the two micro-batches until the ranks agree."""
        return 2 * (self.checkpointer.expected_s + self.watchdog.slowest_step_s) + self.parts.config.engine.stop_margin_s

    def _seed_modules(self, pack: Pack) -> None:
        """Dropout and the like depend on the pack, not on which rank has it."""
        torch.manual_seed(integer_seed(self.parts.config.seed, Purpose.MODULES, pack.step, pack.lane))

    def _loss_totals(self, packs: list[Pack]) -> torch.Tensor:
        """Labelled tokens of each task, image tokens, and packs, of the whole step on all ranks: float64, on the host."""
        counts = [sum(p.image_tokens.sum() for p in packs), len(packs)]
        return self.world.sum(np.append(sum(p.task_labels for p in packs), counts))[: len(self.loss_weights)]

    def _loss_factors(self, totals: torch.Tensor) -> torch.Tensor:
        """What each of the sums that the backbone gives is multiplied by: float32, on the device."""
        # DeepSpeed averages gradients over ranks; the loss is normalised over all of them already
        factor = self.world.size * self.loss_weights / totals.clamp(min=1)
        per_group = factor[: len(TASKS)].repeat(len(self.parts.config.data.sources))
        return self.world.to_device(torch.cat([per_group, factor[len(TASKS) :]]).float())

    def _report(self, step: int, gradient_norm: float) -> None:
        values = self.meters.report()
        times, remarks = self.stragglers.report()
        values |= times | utilisation(values, self.peak_tflops and self.peak_tflops * self.world.size)
        values |= {"optimizer/learning_rate": self.learning_rate, "optimizer/gradient_norm": gradient_norm}
        values["routing/phase"] = 1 + self.parts.phases.number(step)
        values["faults/skipped_steps"] = self.guard.num_skipped
        counts = self.world.sum(np.array([sum(state["counts"][name] for state in self.states.values()) for name in COUNTS]))
        values |= {f"data/{name}": float(count) for name, count in zip(COUNTS, counts)}
        self._reported = values
        learnt: list[TaskName] = [task for task in TASKS if f"loss/{task}" in values]
        if learnt and not any(self.parts.config.loss.task_weights.get(task, 1.0) for task in learnt):
            raise ConfigError(
                f"loss.task_weights: the data holds {' and '.join(learnt)} only, with weight 0: nothing was learnt in {step + 1} steps\n"
                "  do:    give one of them a weight"
            )
        if not self.world.is_main:
            return
        self.board.scalars(values, step + 1)
        for remark in remarks:
            log.info("held up by %s; see %s", remark, self.folder.stragglers)
        self._write_status("running")
        losses = {task: values[f"loss/{task}"] for task in TASKS if f"loss/{task}" in values}
        left_s = values["time/step_s"] * (self.parts.config.optimizer.num_steps - self.step)
        log.info(
            "step %d/%d  %s  lr %.1e  norm %.2f  %.0f tokens/s  flops %.0f%%%s  data wait %.0f%%  left %d:%02d",
            self.step,
            self.parts.config.optimizer.num_steps,
            "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items()),
            self.learning_rate,
            gradient_norm,
            values["throughput/tokens_per_s"],
            100 * values["routing/flops_share"],
            described(values),
            100 * values["time/data_wait_share"],
            *divmod(int(left_s), 60),
        )

    def _write_status(self, state: str) -> None:
        if not self.world.is_main:
            return
        step_s = self._reported.get("time/step_s", 0.0)
        with harmless(str(self.folder.status)):
            write_status(
                self.folder,
                state=state,
                step=self.step,
                num_steps=self.parts.config.optimizer.num_steps,
                world_size=self.world.size,
                step_s=step_s,
                report_s=step_s * self.parts.config.monitor.log_every_steps,
                tokens_per_s=self._reported.get("throughput/tokens_per_s", 0.0),
                skipped=self.guard.num_skipped,
            )

    def _description(self) -> str:
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        return (
            f"{numel / 1e6:.2f}M parameters, ZeRO-3 on {self.world.size} x {self.world.device.type}, "
            f"{self.parts.config.data.num_lanes} packs of up to {self.parts.config.data.pack_tokens} tokens per step, "
            f"{self.parts.phases.num_stages} stages; run folder {self.parts.config.run_dir}"
        )
