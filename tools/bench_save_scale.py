"""What a save costs rank 0 of hundreds of ranks in Python, while the trainer wants to go on: planning, gathering, metadata.

    python tools/bench_save_scale.py --out docs/results/save_scale.json

The tensors are those of a Llama of 7 billion parameters, masters and both moments; their values do not matter. Simulated: what the
other ranks send is made here from rank 0's own. Real: the code that rank 0 runs on it. "Before" is `torch.distributed.checkpoint`, as
it was used until format 3 of the checkpoints. Times are CPU seconds of one thread: it holds Python's lock for most of them. States of
lanes are those of a real run of the recipe `digits`, one for each rank.
"""

import argparse
import json
import pickle
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.engine import checkpoint
from megavlm.engine.checkpoint import Checkpointer
from megavlm.engine.shards import file_of, part_of, write_part
from megavlm.launch.train import make_trainer
from megavlm.runs.retention import CheckpointConfig
from megavlm.system import world as distributed_world
from megavlm.system.world import World

ARCHITECTURE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 512, 1024])
    parser.add_argument(
        "--before", type=int, nargs="*", default=[64, 512, 1024], help="those where the former way is tried too: it takes minutes"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **ARCHITECTURE))
    kinds = ("value", "exp_avg", "exp_avg_sq")
    numel = {f"{kind}/{name}": tensor.numel() for name, tensor in model.named_parameters() for kind in kinds}
    lane, of_rank = _real_states()
    rows = []
    for ranks in options.ranks:
        distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        if ranks in options.before:
            rows.append({"ranks": ranks, "save": "before"} | _former(numel, ranks))
        rows.append({"ranks": ranks, "save": "format 3"} | _present(numel, ranks, lane, of_rank))
        distributed.destroy_process_group()
    print("| ranks | save | a rank's own plan | rank 0: plans | rank 0: to the end | metadata | gathered |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print("| {ranks} | {save} | {own_s:.3f} s | {plan_s:.2f} s".format(**row), end="")
        print(" | {end_s:.2f} s | {metadata_mb:.2f} MB | {gathered_mb:.1f} MB |".format(**row))
    if options.out:
        sizes = {"parameters": sum(numel.values()) // len(kinds), "tensors": len(numel), "bytes_of_a_lane": len(json.dumps(lane))}
        options.out.write_text(json.dumps(sizes | {"rows": rows}, indent=1) + "\n")


def _real_states() -> tuple[Any, Any]:
    """Of a lane and of a rank, after one step of a tiny run."""
    with tempfile.TemporaryDirectory() as folder:
        digits.write(Path(folder, "data"))
        architecture = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
        sources = {t: {"shards": f"{folder}/data/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
        overrides = {"run_dir": f"{folder}/run", "vocabulary.text_model": f"{folder}/data/text.model", "data.sources": sources}
        overrides |= {"model.architecture": architecture | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}}
        trainer = make_trainer(load_config("digits", overrides | {"data.num_lanes": 1}), distributed_world.start(600))
        trainer.train_step(0)
        trainer.step = 1
        trainer.save()
        trainer.checkpointer.close()
        trainer._close()
        distributed_world.stop()
        state = json.loads(Path(folder, "run", "checkpoints", "step-00000001", "state.json").read_text())
    return state["lanes"]["0"], state["ranks"][0]


def _former(numel: dict[str, int], ranks: int) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (ranks,))
    parts = {name: torch.empty(part_of(count, 0, ranks)[1]) for name, count in numel.items()}
    tensors = {
        name: DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel[name]]), stride=(1,))
        for name, part in parts.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        return _former_save(tensors, numel, ranks, folder)


def _former_save(tensors: dict[str, Any], numel: dict[str, int], ranks: int, folder: str) -> dict[str, float]:
    planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
    begin = time.thread_time()
    planner.set_up_planner(tensors, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    own = writer.prepare_local_plan(planner.create_local_plan())
    own_s = time.thread_time() - begin
    sent = [pickle.dumps(_plan_of(own, rank, ranks, numel)) for rank in range(ranks)]
    begin = time.thread_time()
    plans, metadata = planner.create_global_plan([pickle.loads(plan) for plan in sent])
    plans = writer.prepare_global_plan(plans)
    plan_s = time.thread_time() - begin
    told = [pickle.dumps(_written(plan, rank)) for rank, plan in enumerate(plans)]
    begin = time.thread_time()
    writer.finish(metadata, [pickle.loads(result) for result in told])
    end_s = time.thread_time() - begin
    size = Path(folder, ".metadata").stat().st_size
    gathered = sum(map(len, sent)) + sum(map(len, told))
    return {"own_s": own_s, "plan_s": plan_s, "end_s": end_s, "metadata_mb": size / 1e6, "gathered_mb": gathered / 1e6}


def _plan_of(plan: Any, rank: int, ranks: int, numel: dict[str, int]) -> Any:
    """Another rank's plan, from rank 0's: other offsets and sizes."""
    items = []
    for item in plan.items:
        first, last = part_of(numel[item.index.fqn], rank, ranks)
        index = replace(item.index, offset=torch.Size([first]), index=rank)
        chunk = replace(item.tensor_data.chunk, offsets=torch.Size([first]), sizes=torch.Size([last - first]))
        items.append(replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=chunk)))
    return replace(plan, items=items)


def _written(plan: Any, rank: int) -> list[WriteResult]:
    results, place = [], 0
    for item in plan.items:
        size = 4 * item.tensor_data.chunk.sizes[0] + 1300
        results.append(WriteResult(item.index, size, _StorageInfo(f"__{rank}_0.distcp", place, size)))
        place += size
    return results


def _present(numel: dict[str, int], ranks: int, lane: Any, of_rank: Any) -> dict[str, float]:
    # the group is the fake one
    with tempfile.TemporaryDirectory() as folder, patch.object(checkpoint, "new_host_group", return_value=None):
        checkpointer = Checkpointer(Path(folder), World(0, ranks, 0, torch.device("cpu")), CheckpointConfig())
        final = Path(folder, "step-00000001")
        temporary = checkpointer._make_temporary(final)
        empty = {name: torch.empty(0) for name in numel}
        begin = time.thread_time()
        (entry,) = write_part(temporary / "tensors", 0, empty).values()  # all that is Python, and no bytes
        own_s = time.thread_time() - begin
        told = [pickle.dumps((({file_of(rank): entry}, ({rank: lane}, of_rank)), None)) for rank in range(ranks)]
        content = checkpoint._Content(empty, numel, {"step": 1}, ({}, None), {}, time.perf_counter())
        begin = time.thread_time()
        checkpointer._complete(temporary, final, content, [pickle.loads(outcome)[0] for outcome in told])
        end_s = time.thread_time() - begin
        size = sum((final / name).stat().st_size for name in ("manifest.json", "tensors/layout.json"))
        checkpointer.close()
    return {"own_s": own_s, "plan_s": 0.0, "end_s": end_s, "metadata_mb": size / 1e6, "gathered_mb": sum(map(len, told)) / 1e6}


if __name__ == "__main__":
    main()
