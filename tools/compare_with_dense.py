#!/usr/bin/env python
"""FLOPs and time of a run's route, as shares of the same packs without a route.

    python tools/compare_with_dense.py runs/digits [--num_packs=8] [--repeats=5]

Forward and backward pass of the same packs, routed and dense in turn, in one process. The optimizer step is left out, because a
route does not change it. Time is the median over repeats of the sum over packs. Writes RUN/speed.json.
"""

import json
import statistics
import time

import fire
import torch

from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_run_config
from megavlm.routing.config import RoutingConfig
from megavlm.runs.folder import RunFolder


def compare(run: str, num_packs: int = 8, repeats: int = 5):
    """Measure a run's route against dense.

    Args:
        run: The run folder.
        num_packs: Packs from the beginning of lane 0.
        repeats: Passes over all of them, routed and dense in turn.
    """
    folder = RunFolder(run)
    config = load_run_config(folder)
    understanding, generation = config.routing.trained
    parts = Parts(config.model_copy(update={"routing": RoutingConfig(understanding=understanding, generation=generation)}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(config.seed)
    backbone = parts.make_backbone()
    backbone.to(device, dtype)
    lane = parts.make_lane(0)
    routed = [next(lane)[0] for _ in range(num_packs)]
    packs = {
        "routed": [pack.to(device) for pack in routed],
        "dense": [pack.with_dense_route().to(device) for pack in routed],
    }
    seconds = {"routed": [], "dense": []}
    for repeat in range(repeats + 1):  # the first is the warm-up
        for kind in ("routed", "dense"):
            begin = _now(device)
            for pack in packs[kind]:
                backbone(pack).sum().backward()
            if repeat:
                seconds[kind].append(_now(device) - begin)
    result = {
        "flops_share": sum(pack.flops.sum() for pack in routed) / sum(pack.dense_flops.sum() for pack in routed),
        "time_share": statistics.median(seconds["routed"]) / statistics.median(seconds["dense"]),
        "time_share_lowest_highest": [
            min(r / d for r, d in zip(seconds["routed"], seconds["dense"])),
            max(r / d for r, d in zip(seconds["routed"], seconds["dense"])),
        ],
        "command": f"python tools/compare_with_dense.py {run} --num_packs={num_packs} --repeats={repeats}",
    }
    (folder.path / "speed.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    fire.Fire(compare)
