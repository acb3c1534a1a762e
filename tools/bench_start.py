"""Host memory of a start: a model that is made divided, beside one that every process makes whole and divides then, as was done before.

    python tools/bench_start.py --out docs/results/start.json

Random weights, then the same model from a folder of safetensors, where the bytes of the tensors that all processes read are counted. Every
arm runs in processes of its own, one arm after the other; prints a table. Memory and CPU seconds are those of the process that has most.
"""

import argparse
import json
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megavlm.benchmarks import digits
from megavlm.engine.partition import make_partitioned
from megavlm.model.backbone import make_causal_lm
from megavlm.system import world as distributed
from megavlm.training import initial
from megavlm.vocabulary import Vocabulary

DOCUMENT = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        architecture = {
            "model_type": "qwen3",
            "hidden_size": options.width,
            "intermediate_size": 3 * options.width,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.width // 64,
            "num_key_value_heads": options.width // 64,
            "head_dim": 64,
            "tie_word_embeddings": False,
        }
        _write(architecture, folder)
        print("| processes | weights | made | most memory of a process beyond its begin | bytes read | seconds | CPU seconds |")
        print("|---|---|---|---|---|---|---|")
        rows = []
        for number, from_files, divided in product(options.processes, (False, True), (False, True)):
            row = _measure(architecture, folder, number, from_files=from_files, divided=divided)
            print("| {processes} | {weights} | {made} | {peak_gb:.2f} GB | {read_gb:.2f} GB".format(**row), end="")
            print(" | {seconds:.0f} | {cpu_seconds:.0f} |".format(**row), flush=True)
            rows.append(row)
    if options.out:
        options.out.write_text(json.dumps({"parameters": rows[0]["parameters"], "rows": rows}, indent=1) + "\n")


def _write(architecture: dict[str, Any], folder: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_save, args=(architecture, folder))
    process.start()
    process.join()


def _save(architecture: dict[str, Any], folder: str) -> None:
    digits.write(Path(folder, "data"))
    vocabulary = Vocabulary(f"{folder}/data/text.model", 17)
    make_causal_lm(architecture, vocabulary.size).save_pretrained(f"{folder}/model", max_shard_size="500MB")


def _measure(architecture: dict[str, Any], folder: str, processes: int, *, from_files: bool, divided: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(queue, (rank, processes, port), architecture, folder, from_files, divided))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    found = [queue.get() for _ in ranks]
    for process in ranks:
        process.join()
    return {
        "processes": processes,
        "weights": "from safetensors" if from_files else "random",
        "made": "divided" if divided else "whole, then divided",
        "parameters": found[0]["parameters"],
        "peak_gb": max(rank["peak"] for rank in found) / 1e9,
        "read_gb": sum(rank["read"] for rank in found) / 1e9,
        "seconds": max(rank["seconds"] for rank in found),
        "cpu_seconds": max(rank["cpu_seconds"] for rank in found),
    }


def _rank(queue, place, architecture: dict[str, Any], folder: str, from_files: bool, divided: bool) -> None:
    logging.disable(logging.WARNING)
    rank, size, port = place
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    import deepspeed

    world = distributed.start(600)
    torch.manual_seed(0)
    world.barrier()
    before, begin, cpu_begin = _status("VmRSS"), time.perf_counter(), time.process_time()
    vocabulary = Vocabulary(f"{folder}/data/text.model", 17)
    make = partial(make_causal_lm, architecture, vocabulary.size)
    if divided:
        model = make_partitioned(make, DOCUMENT, bfloat16=False, device=world.device)
        if from_files:
            initial.safe_open = _Counted
            initial.load_initial_weights(f"{folder}/model", model, vocabulary, world)
    else:
        model = make()
        if from_files:
            files = [_Counted(file, framework="pt") for file in sorted(Path(folder, "model").glob("*.safetensors"))]
            model.load_state_dict({name: file.get_tensor(name) for file in files for name in file.keys()})  # noqa: SIM118 (no mapping)
        deepspeed.zero.Init(module=model, config_dict_or_path=DOCUMENT)
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    times = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu_begin}
    queue.put({"peak": _status("VmHWM") - before, "read": _Counted.num_bytes, "parameters": parameters} | times)
    world.barrier()


class _Counted:
    """A file of safetensors that counts what is read of it."""

    num_bytes = 0

    def __init__(self, *args: Any, **named: Any):
        self.file = safe_open(*args, **named)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_failure: Any) -> None:
        del self.file

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name)
        _Counted.num_bytes += tensor.nbytes
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _status(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
