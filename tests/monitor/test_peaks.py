"""Peaks by device name, and utilisation against FLOPs that torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.monitor.metrics import Meters
from megavlm.monitor.peaks import described, peak_tflops_here, peak_tflops_of, utilisation
from megavlm.parts.parts import Parts
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GB200", 2500.0),
        ("AMD Instinct MI300X", 1307.0),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(name, peak):
    assert peak_tflops_of(name) == peak


def test_no_peak_is_guessed():
    assert peak_tflops_here(torch.device("cpu"), torch.bfloat16) is None
    assert peak_tflops_here(torch.device("cuda"), torch.float32) is None
    assert utilisation({"throughput/executed_tflops_per_s": 1.0}, None) == {}
    assert described({}) == ""


def utilisation_and_count(world, config) -> dict[str, float]:
    """What a meter says of one pack, relative to a peak of 1 TFLOP/s, and the TFLOP that torch counts, routed and dense."""
    parts = Parts(config)
    backbone, pack = parts.make_backbone(), next(parts.make_lane(0))[0]
    counted = {}
    for name, work in (("routed", pack), ("dense", pack.with_dense_route())):
        # the fused attention of CPUs is not counted; the plain one computes the half of the scores that is masked, too
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            backbone(work)
        stages = work.route.stages
        masked = sum((s.end_layer - s.first_layer) * sum(length**2 for length in s.sequences.lengths) for s in stages)
        counted[name] = 3 * (counter.get_total_flops() - parts.shape.layer_flops_per_square * masked) / 1e12
    meters = Meters(world, ["understanding", "generation"], parts.phases.bounds, backbone.recomputed_shares(parts.phases.bounds))
    meters.add_step(0.0)
    meters.add_pack(pack, torch.zeros(6))
    values = meters.report()
    return {
        **{f"counted_{name}": tflop / values["time/step_s"] for name, tflop in counted.items()},
        **utilisation(values, 1.0),
        "recomputed": values["throughput/recomputed_tflops_per_s"],
    }


def test_utilisation_is_that_of_counted_flops(make_config):
    route = {"policy": "shared_bypass", "keep_ratio": 0.25}
    config = Parts(make_config({"routing.understanding": route, "routing.generation": route})).with_mixture().config
    (found,) = run_ranks(1, utilisation_and_count, config)
    executed, dense = found["throughput/executed_mfu"], found["throughput/dense_equivalent_mfu"]
    assert executed - found["recomputed"] < 0.9 * dense
    # the output head, in chunks here, is computed again: that is executed, and no part of dense training
    assert found["recomputed"] > 0
    assert executed == pytest.approx(found["counted_routed"] + found["recomputed"], rel=1e-3)
    assert dense == pytest.approx(found["counted_dense"], rel=1e-3)
