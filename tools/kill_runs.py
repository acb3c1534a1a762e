"""Kill a run with SIGKILL at random moments, again and again, and check what is left (P11).

    python tools/kill_runs.py --kills 50 --out docs/results/kill_runs.json

Checkpoints are written in the background every second step, so that nearly every kill hits a save. Sometimes all
processes are killed at once, sometimes one of them. After every kill the script checks: checkpoints that were
reported complete are complete and intact, none that looks complete is damaged, and the next start resumes from the newest. At the end the
run is finished, and has trained on exactly the samples of an undisturbed run, in the same order.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import re
import socket
import tempfile
import time
from functools import partial
from pathlib import Path

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.launch import train as launch
from megavlm.parts.parts import Parts
from megavlm.runs.manifest import complete_checkpoints, step_of, verify
from megavlm.training.forensics import chain

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "deepspeed", "megavlm.launch.train", "megavlm.training.trainer"])


def settings(data: Path, run: Path, hidden_size: int, num_steps: int) -> dict:
    """Overrides of the recipe `digits`: small, and saving all the time."""
    architecture = {"model_type": "qwen3", "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    architecture |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    architecture |= {"head_dim": hidden_size // 4, "max_position_embeddings": 256}
    sources = {t: {"shards": f"{data}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    return {
        "run_dir": str(run),
        "vocabulary.text_model": str(data / "text.model"),
        "data.sources": sources,
        "model.architecture": architecture,
        "data.pack_tokens": 340,
        "data.look_ahead_samples": 12,
        # packs depend on the share of the run that is done, and the last start is told another end
        "routing.dense_finish_fraction": 0.0,
        "optimizer.num_steps": num_steps,
        "optimizer.warmup_steps": 2,  # the last start may end after few steps
        "monitor.sample_every_steps": None,
        "monitor.log_every_steps": 1,
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 3,
    }


def start(overrides: dict, world_size: int, log: Path) -> list:
    """The processes of a run, each a fork of a clean parent that has imported everything: 50 starts need not import
    it 50 times."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = []
    for rank in range(world_size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(_context.Process(target=_train, args=(place, overrides, log)))
        processes[-1].start()
    return processes


def _train(place: dict, overrides: dict, log: Path) -> None:
    os.environ |= place
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    launch.train("digits", overrides)


def kill(processes: list, victims: list[int]) -> None:
    """SIGKILL to the victims; to the others when they have noticed, or after a while."""
    for victim in victims:
        processes[victim].kill()
    deadline = time.monotonic() + 20
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()


def kill_again_and_again(folder: Path, kills: int, world_size: int, hidden_size: int, seed: int = 0, num_steps: int = 10**6) -> dict:
    """Do it, and say what was seen.

    Raises:
        AssertionError: If something was lost, or a partial checkpoint looked complete.
    """
    chance, run = random.Random(seed), folder / "run"
    if not (folder / "data").exists():
        digits.write(folder / "data")
    overrides = settings(folder / "data", run, hidden_size, num_steps)
    counts = {"kills": 0, "while_writing": 0, "of_one_rank_only": 0, "before_the_first_step": 0, "checkpoints_reported": 0}
    newest = 0
    for number in range(kills):
        log = folder / f"start-{number}.txt"
        log.touch()
        processes = start(overrides, world_size, log)
        # some steps on, most often; sometimes any time from the very start. Counted in steps, for the machine may be busy
        if chance.random() < 0.85:
            num_steps_seen = chance.randint(1, 9)
            wait_for(partial(_shows_steps, num_steps_seen), log, processes)
            time.sleep(chance.uniform(0, 0.6))
        else:
            time.sleep(chance.uniform(0, 4))
        alone = chance.random() < 0.3
        kill(processes, [chance.randrange(world_size)] if alone else list(range(world_size)))
        text = log.read_text()
        reported = [int(step) for step in re.findall(r"checkpoint \S*step-(\d+): [\d.]+ MB", text)]
        if "ZeRO-3 on" in text:
            resumed = re.search(r"resuming after step (\d+)", text)
            assert (int(resumed[1]) if resumed else 0) == newest, f"start {number} goes on from {resumed}, not from {newest}"
        complete = complete_checkpoints(run / "checkpoints")
        for checkpoint in complete:
            assert not (problems := verify(checkpoint)), f"{checkpoint} looks complete: {problems}"
        steps = [step_of(checkpoint) for checkpoint in complete]
        lost = set(sorted({*reported, newest} - {0})[-3:]) - set(steps)
        # those that the retention rule removed for newer ones are not lost
        lost = {step for step in lost if step > max(steps, default=0) or len([s for s in steps if s > step]) < 3}
        assert not lost, f"start {number}: steps {lost} were reported complete and are gone: {steps}"
        newest = max(steps, default=0)
        counts["kills"] += 1
        counts["while_writing"] += bool(list((run / "checkpoints").glob(".writing-*")))
        counts["of_one_rank_only"] += alone
        counts["before_the_first_step"] += not re.search(r"step \d+/", text)
        counts["checkpoints_reported"] += len(reported)
        print(f"kill {number + 1}: newest {newest}, reported {reported[-3:]}", flush=True)
    last = newest + 4
    for process in start(overrides | {"optimizer.num_steps": last}, world_size, folder / "last.txt"):
        process.join(300)
        assert process.exitcode == 0, (folder / "last.txt").read_text()
    check_data(run, last)
    return counts | {"steps": last, "world_size": world_size, "seed": seed}


def _shows_steps(num_steps: int, text: str) -> bool:
    return len(re.findall(r"^step \d+/", text, re.M)) >= num_steps


def wait_for(condition, log: Path, processes: list) -> None:
    deadline = time.monotonic() + 120
    while not condition(log.read_text()):
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes), log.read_text()
        time.sleep(0.05)


def check_data(run: Path, step: int) -> None:
    """The run has trained on the samples that its lanes give, each once, in their order."""
    state = json.loads((complete_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
    digests = {lane: digest for rank in state["ranks"] for lane, digest in rank["digests"].items()}
    config = load_config(str(run / "config.yaml"))
    assert state["step"] == step and len(digests) == config.data.num_lanes
    for number in range(config.data.num_lanes):
        digest, lane = "", Parts(config).make_lane(number)
        for _ in range(step):
            digest = chain(digest, next(lane)[0])
        assert digests[str(number)] == digest, f"lane {number} trained on other samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a temporary one by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_runs-"))
    folder.mkdir(exist_ok=True)
    begin = time.monotonic()
    result = kill_again_and_again(folder, options.kills, options.world_size, options.hidden_size, options.seed)
    result |= {"lost": 0, "partial_taken": 0, "minutes": round((time.monotonic() - begin) / 60, 1)}
    print(json.dumps(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
