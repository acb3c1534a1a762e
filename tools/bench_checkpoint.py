"""How long training waits for a checkpoint: written in the background, written at once, and as DeepSpeed writes its own.

    torchrun --standalone --nproc-per-node 2 tools/bench_checkpoint.py --out docs/results/checkpoint_stall.json

All three run in one call, on the same state, into the same folder. Background saves run while steps are taken; steps
beside a save are compared with steps without one.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.launch.train import make_trainer
from megavlm.system import world as distributed
from megavlm.training.trainer import Trainer

ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="on the file system to measure; a temporary one by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    world = distributed.start(600)
    folder = Path(world.gather(str(options.folder or tempfile.mkdtemp(prefix="bench_checkpoint-")))[0])
    if world.is_main:
        digits.write(folder / "data")
    world.barrier()
    trainer = make_trainer(load_config("digits", _settings(folder, world.size, options)), world)
    numel = sum(p.ds_numel for p in trainer.engine.module.parameters())
    alone_s = [_step(trainer) for _ in range(ROUNDS)]
    # the first save makes the host buffers; it is reported on its own
    first_s = _timed(world, trainer.save)
    trainer.checkpointer.wait()

    checkpointer, background, beside_s = trainer.checkpointer, [], []
    for _ in range(ROUNDS):
        trainer.step += 1
        stall_s = _timed(world, trainer.save)
        while checkpointer._pending is not None and not checkpointer._pending.done():
            beside_s.append(_step(trainer))
        saved = checkpointer.wait()
        assert saved is not None
        background.append((stall_s, saved.seconds))
    at_once_s = []
    trainer.checkpointer.config = trainer.checkpointer.config.model_copy(update={"background": False})
    for _ in range(ROUNDS):
        trainer.step += 1
        at_once_s.append(_timed(world, trainer.save))
    deepspeed_s = []
    engine: Any = trainer.engine  # what we use of it is less than what it has
    for _ in range(ROUNDS):
        deepspeed_s.append(_timed(world, lambda: engine.save_checkpoint(str(folder / "deepspeed"), tag="a")))
        if world.is_main:
            shutil.rmtree(folder / "deepspeed")
        world.barrier()
    trainer.watchdog.stop()
    if world.is_main:
        stall_s = statistics.median(s for s, _ in background)
        result = {
            "parameters": numel,
            "world_size": world.size,
            "device": world.device.type,
            "first_stall_s": round(first_s, 3),
            "background_stall_s": round(stall_s, 4),
            "background_until_complete_s": round(statistics.median(s for _, s in background), 3),
            "synchronous_save_s": round(statistics.median(at_once_s), 3),
            "deepspeed_save_checkpoint_s": round(statistics.median(deepspeed_s), 3),
            "stall_over_synchronous": round(stall_s / statistics.median(at_once_s), 4),
            "stall_over_deepspeed": round(stall_s / statistics.median(deepspeed_s), 4),
            "step_s": round(statistics.median(alone_s), 3),
            "step_beside_a_save_s": round(statistics.median(beside_s), 3) if beside_s else None,
        }
        print(json.dumps(result, indent=1))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        shutil.rmtree(folder)
    distributed.stop()


def _settings(folder: Path, world_size: int, options) -> dict:
    architecture = {"model_type": "qwen3", "hidden_size": options.width, "intermediate_size": 3 * options.width}
    architecture |= {"num_hidden_layers": options.layers, "num_attention_heads": 16, "num_key_value_heads": 16}
    architecture |= {"head_dim": options.width // 16, "max_position_embeddings": 256}
    sources = {t: {"shards": f"{folder}/data/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    return {
        "run_dir": str(folder / "run"),
        "vocabulary.text_model": str(folder / "data" / "text.model"),
        "data.sources": sources,
        "model.architecture": architecture,
        "data.num_lanes": world_size,
        "data.pack_tokens": 128,
        "data.look_ahead_samples": 8,
        "checkpoint.keep_last": 1,
    }


def _step(trainer: Trainer) -> float:
    def step() -> None:
        norm = trainer.train_step(trainer.step)
        assert norm is not None  # nobody stops this run
        float(norm)

    return _timed(trainer.world, step)


def _timed(world, function) -> float:
    """Seconds of the slowest rank."""
    world.barrier()
    begin = time.perf_counter()
    function()
    return max(world.gather(time.perf_counter() - begin))


if __name__ == "__main__":
    main()
