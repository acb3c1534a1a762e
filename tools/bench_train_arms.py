"""The arms of `tools/bench_train.py`: what the processes of one arm do.

Every arm runs its public loop, `Trainer.run` of megavlm or `Trainer.train` of transformers, in processes of its own. A hook at the end of
each step (`Turns`) stops the clock after a turn of some steps, evaluates, and waits until it is the arm's turn again.

Letters: L tokens of a sample. Tested by `tests/tools/test_bench_train.py`.
"""

import ctypes
import logging
import os
import resource
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train_data import FOREVER_S, Job, encoded, labels_of, recipe
from torch import distributed
from torch.nn import functional
from torch.utils.data import Dataset

from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Pack
from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.model.backbone import make_causal_lm
from megavlm.parts.parts import Parts
from megavlm.system import world as distributed_world
from megavlm.training.observers import Observer, Training


@dataclass
class Counts:
    """What one rank did in one turn."""

    tokens: float = 0
    """Without padding."""
    positions: float = 0
    """With padding."""
    samples: float = 0
    dense_flops: float = 0
    """Of a forward pass over these samples without padding and without a route, by formula."""
    executed_flops: float = 0
    """With the route; padding is not counted."""

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


class HeldOut:
    """The mean cross-entropy per labelled token of the held-out samples: one at a time, every token in every layer, in float32.

    The same code for all arms: it takes the weights out of ZeRO-3 and runs a stock model with them.
    """

    def __init__(self, parts: Parts, folder: str):
        self.samples = encoded(parts, folder, "test")
        with torch.device("meta"):
            self.model = make_causal_lm(parts.config.model.architecture, parts.vocabulary.size)
        self.model.config._attn_implementation = "sdpa"

    def loss(self, causal_lm: torch.nn.Module, rank: int, ranks: int, device: torch.device) -> float:
        """Called by all ranks together; each takes its share of the samples."""
        from deepspeed.runtime.zero import GatheredParameters

        total = torch.zeros(2, dtype=torch.float64, device=device)
        with GatheredParameters(list(causal_lm.parameters())), torch.no_grad():
            weights = {name: p.data.float() for name, p in causal_lm.named_parameters()} | dict(causal_lm.named_buffers())
            for sample in self.samples[rank::ranks]:
                ids_1L = torch.from_numpy(sample.tokens)[None].to(device)
                labels_L = torch.from_numpy(labels_of(sample)).to(device)
                given = {"input_ids": ids_1L, "use_cache": False}
                logits_LV = torch.func.functional_call(self.model, weights, (), given).logits[0]
                total[0] += functional.cross_entropy(logits_LV[:-1].float(), labels_L[1:], ignore_index=-100, reduction="sum")
                total[1] += (labels_L != -100).sum()
        distributed.all_reduce(total)
        return float(total[0] / total[1])


class Turns:
    """Steps of an arm, some at a time, as the coordinator wants them. One per rank.

    Args:
        connection: To the coordinator.
        job: What to do.
        held_out: The judge.
        causal_lm: The model under training.
        device: Where it is.
    """

    def __init__(self, connection: Connection, job: Job, held_out: HeldOut, causal_lm: torch.nn.Module, *, device: torch.device):
        self.connection = connection
        self.job = job
        self.held_out = held_out
        self.causal_lm = causal_lm
        self.device = device
        self.rank = int(os.environ["RANK"])
        self.counts = Counts()
        self.steps = 0
        self.begin_s = 0.0

    def wait(self) -> None:
        """Tell the coordinator what was done and what it led to, and wait for the next turn."""
        _synchronize(self.device)
        done = {"seconds": time.perf_counter() - self.begin_s, "peak_bytes": _peak_bytes(self.device), "steps": self.steps}
        done |= asdict(self.counts)
        done["loss"] = self.held_out.loss(self.causal_lm, self.rank, self.job.ranks, self.device)
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # the other arms need the memory
        self.connection.send(done)
        while (order := self.connection.recv()) != "go":
            if order == "end":
                os._exit(0)
            self.connection.send(ceiling(self.job, self.device))
        self.counts, self.steps = Counts(), 0
        _forget_peak(self.device)
        _synchronize(self.device)
        self.begin_s = time.perf_counter()

    def step_done(self) -> None:
        """Called after every optimizer step."""
        self.steps += 1
        if self.steps == self.job.steps_per_turn:
            self.wait()


def ceiling(job: Job, device: torch.device) -> float:
    """FLOP/s of this rank in the largest matrix product of the model, while all ranks do the same; the best of some."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(job.pack_tokens, job.width), torch.randn(job.width, 3 * job.width)
    a, b = a.to(device, dtype), b.to(device, dtype)
    best_s = float("inf")
    for _ in range(20):
        _synchronize(device)
        begin_s = time.perf_counter()
        torch.matmul(a, b)
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return 2 * job.pack_tokens * 3 * job.width**2 / best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def rank_main(connection: Connection, job: Job, place: dict[str, str]) -> None:
    """One rank of an arm, until the coordinator ends it."""
    os.environ |= place
    log = job.log.open("a")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(job.threads)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        (_megavlm if job.arm in ("dense", "route") else _transformers)(connection, job)
    except BaseException:
        _give_up(connection)


def _give_up(connection: Connection) -> None:
    connection.send(traceback.format_exc())
    os._exit(1)


class _AtEveryStep(Observer):
    """Counts packs and takes turns."""

    name = "bench"

    def __init__(self, connection: Connection, job: Job):
        self.connection = connection
        self.job = job

    def attach(self, training: Training) -> None:
        held_out = HeldOut(training.parts, self.job.folder)
        self.turns = Turns(self.connection, self.job, held_out, training.engine.module.causal_lm, device=training.world.device)
        self.turns.wait()

    def around_pack(self, step: int, number: int, pack: Pack) -> AbstractContextManager:
        self.turns.counts.add(
            Counts(pack.num_tokens, pack.num_tokens, len(pack.keys), float(pack.dense_flops.sum()), float(pack.flops.sum()))
        )
        return nullcontext()

    def after_step(self, num_steps: int) -> None:
        try:
            self.turns.step_done()
        except BaseException:  # the trainer would go on without its observer
            _give_up(self.connection)


def _megavlm(connection: Connection, job: Job) -> None:
    from megavlm.observers.drawings import Drawings
    from megavlm.observers.instruments import Instruments
    from megavlm.parts.resolve import resolve
    from megavlm.runs.folder import RunFolder
    from megavlm.training.trainer import Trainer

    config, world = recipe(job), distributed_world.start(FOREVER_S)
    parts = resolve(config, RunFolder(config.run_dir), world)
    Trainer(parts, world, [Instruments(), Drawings(), _AtEveryStep(connection, job)]).run()


class _Samples(Dataset):
    """Tokens and labels, as transformers takes them."""

    def __init__(self, samples: list[EncodedSample]):
        self.items = [{"input_ids": sample.tokens.tolist(), "labels": labels_of(sample).tolist()} for sample in samples]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def pad(items: list[dict]) -> dict[str, torch.Tensor]:
    """The collator of padded batches: to the longest of the batch, on the right."""
    ids, labels = ([torch.tensor(item[name]) for item in items] for name in ("input_ids", "labels"))
    mask = [torch.ones_like(x) for x in ids]
    values = {"input_ids": (ids, 0), "labels": (labels, -100), "attention_mask": (mask, 0)}
    return {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value) for name, (rows, value) in values.items()}


def _collator(arm: str) -> Callable[[list[dict]], Any]:
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening() if arm == "flattened" else pad


def _transformers(connection: Connection, job: Job) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils.import_utils import is_flash_attn_2_available

    parts = Parts(recipe(job))
    has_cuda = torch.cuda.is_available()
    world = distributed_world.start(FOREVER_S)
    held_out = HeldOut(parts, job.folder)
    shape, samples = parts.shape, encoded(parts, job.folder, "train")
    mean_tokens = float(np.mean([sample.num_tokens for sample in samples]))
    torch.manual_seed(parts.config.seed)
    causal_lm = parts.make_causal_lm()
    if job.arm == "flattened" and has_cuda and is_flash_attn_2_available():
        causal_lm.set_attn_implementation("flash_attention_2")
    collate, counted = _collator(job.arm), deque[Counts]()

    def collate_and_count(items: list[dict]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(collate(items))
        counted.append(_counts(items, batch["input_ids"].numel(), shape))
        return batch

    turns = Turns(connection, job, held_out, causal_lm, device=world.device)
    # batches are made ahead: they count when the model gets them
    causal_lm.register_forward_pre_hook(lambda *_: turns.counts.add(counted.popleft()))

    class AtEveryStep(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.wait()

        def on_step_end(self, *_, **__):
            turns.step_done()

    optimizer = parts.config.optimizer
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    arguments = TrainingArguments(
        output_dir=f"{job.folder}/{job.arm}",
        per_device_train_batch_size=max(1, round(parts.config.data.fill * job.pack_tokens / mean_tokens)),
        gradient_accumulation_steps=job.packs_per_rank,
        train_sampling_strategy="group_by_length" if job.arm == "grouped" else "random",
        max_steps=optimizer.num_steps,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.gradient_clipping,
        bf16=has_cuda,
        use_cpu=not has_cuda,
        deepspeed=read_deepspeed_file(job.deepspeed) | dict.fromkeys(auto, "auto") | {"bf16": {"enabled": "auto"}},
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(
        model=causal_lm, args=arguments, train_dataset=_Samples(samples), data_collator=collate_and_count, callbacks=[AtEveryStep()]
    ).train()


def _counts(items: list[dict], positions: int, shape: ModelShape) -> Counts:
    lengths = np.array([len(item["input_ids"]) for item in items])
    labels = sum(label != -100 for item in items for label in item["labels"])
    flops = float(shape.num_layers * shape.layers_flops(lengths).sum() + labels * shape.head_flops_per_row)
    return Counts(float(lengths.sum()), positions, len(items), flops, flops)
