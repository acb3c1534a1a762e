#!/usr/bin/env python
"""Does it take longer to resume late in a corpus than early? Time from a lane's state to its next pack, around steps 10 and 10,000.

    python tools/bench_resume.py --out docs/data/resume.json

Writes a corpus of small shards with samples of 64 image codes and text, and runs one lane over it to step 10,000 (some minutes). Then it
makes the lane again from states of both times, in turns, several times. A lane reads the samples of its look-ahead and the heads of its
current shards again, however far it has come. The length of these heads changes from step to step. So states are taken over 60 steps, in
which a lane reads about one shard of each source.
"""

import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import numpy as np
from rich.progress import track
from webdataset.writer import TarWriter

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.parts.parts import Parts

EARLY = range(10, 70, 6)


def write(folder: Path, num_shards: int, samples_per_shard: int) -> None:
    """Shards of both tasks; the codes do not matter."""
    digits.write(folder)
    content = io.BytesIO()
    np.save(content, np.zeros((8, 8), np.int16))
    for shard in track(range(num_shards), description="writing shards"):
        task = ("understanding", "generation")[shard % 2]
        image: dict[str, Any] = {"image": "img0"}
        text: dict[str, Any] = {"text": "a handwritten seven"}
        (image if task == "generation" else text)["loss"] = True
        record = {"task": task, "segments": [image, text] if task == "understanding" else [text, image]}
        with TarWriter(str(folder / f"corpus-{task}-{shard // 2:04d}.tar"), encoder=False, mtime=0) as writer:
            for i in range(samples_per_shard):
                writer.write({"__key__": f"{shard:04d}-{i:05d}", "json": json.dumps(record).encode(), "img0.npy": content.getvalue()})


def bench(late: int = 10_000, num_shards: int = 400, samples_per_shard: int = 500, repeats: int = 5, out: str = ""):
    """Measure it.

    Args:
        late: The later steps begin here.
        num_shards: Of the corpus, over both tasks.
        samples_per_shard: In each.
        repeats: Resumes from each state.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, num_shards, samples_per_shard)
        overrides = {
            "vocabulary.text_model": str(folder / "text.model"),
            "data.sources": {
                task: {"shards": f"{folder}/corpus-{task}-{{0000..{num_shards // 2 - 1:04d}}}.tar"}
                for task in ("understanding", "generation")
            },
            "data.num_lanes": 1, "data.pack_tokens": 1280, "data.look_ahead_samples": 64,
        }  # fmt: skip
        factory = Parts(load_config("digits", overrides)).with_mixture().make_lane
        when = {"early": EARLY, "late": range(late, late + len(EARLY) * EARLY.step, EARLY.step)}
        lane, states = factory(0), {"early": [], "late": []}
        for step in track(range(1, when["late"].stop), description=f"running the lane past step {late}"):
            _, state = next(lane)
            for name, steps in when.items():
                if step in steps:
                    states[name].append(state)
        seconds = {name: [] for name in states}
        read_again: dict[str, float] = dict.fromkeys(states, 0)
        for repeat in track(range(repeats + 1), description="resuming"):
            for early_and_late in zip(*states.values()):
                for name, state in zip(states, early_and_late):
                    begin = time.process_time()
                    resumed = factory(0, state)
                    next(resumed)
                    if repeat:  # the first warms up
                        seconds[name].append(time.process_time() - begin)
                        read_again[name] += sum(resumed.read_again.values()) / repeats / len(EARLY)
    result = {
        "corpus_samples": num_shards * samples_per_shard,
        "steps": {name: [steps[0], steps[-1]] for name, steps in when.items()},
        "resume_cpu_ms": {
            name: dict(zip(("mean", "lowest", "highest"), (1e3 * f(v) for f in (statistics.mean, min, max)))) for name, v in seconds.items()
        },
        "late_over_early": statistics.mean(seconds["late"]) / statistics.mean(seconds["early"]),
        "samples_read_again": read_again,
        "command": f"python tools/bench_resume.py --late={late} --num_shards={num_shards}"
        f" --samples_per_shard={samples_per_shard} --repeats={repeats}",
    }
    print(json.dumps(result, indent=1))
    if out:
        Path(out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    fire.Fire(bench)
