"""What TensorBoard's page "Custom Scalars" shows, in which order: what a run is for comes first.

Tested by `tests/observers/test_window.py`.
"""

from typing import Any


def _chart(*tags: str) -> list[Any]:
    return ["Multiline", [*tags]]


LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1 quality": {
        "loss per task": _chart(r"^loss/"),
        "loss per source": _chart(r"^loss_by_source/"),
        "held-out loss": _chart(r"^evaluation/losses/", r"^validation/"),
        "held-out answers and drawings": _chart(r"^evaluation/(understanding|generation)/(accuracy|exact_match)"),
        "Fréchet distance of held-out drawings": _chart(r"^evaluation/generation/frechet_distance"),
    },
    "2 speed": {
        "tokens per second": _chart(r"^throughput/tokens_per_s$"),
        "TFLOP per second": _chart(r"^throughput/.*tflops"),
        "share of the peak (MFU)": _chart(r"mfu"),
        "seconds per step": _chart(r"^time/step_s$"),
        "share of time that ranks wait for data": _chart(r"^time/data_wait_share$"),
        "FLOPs left by the route": _chart(r"^routing/flops_share"),
        "phase of the route": _chart(r"^routing/phase$"),
    },
    "3 balance": {
        "slowest rank over mean": _chart(r"^balance/(planned|measured)_max_over_mean$"),
        "slowest hardware over median": _chart(r"^balance/probe_max_over_median$"),
        "seconds that the slowest loader took": _chart(r"^balance/data_wait_max_s$"),
    },
    "4 data": {
        "image tokens kept per stage, reading": _chart(r"^kept_tokens/understanding/"),
        "image tokens kept per stage, drawing": _chart(r"^kept_tokens/generation/"),
        "samples with errors, cut or left out": _chart(r"^data/"),
        "tokens so far": _chart(r"^totals/(tokens|labels)"),
    },
    "5 health": {
        "gradient norm": _chart(r"^optimizer/gradient_norm$"),
        "learning rate": _chart(r"^optimizer/learning_rate$"),
        "skipped steps": _chart(r"^faults/"),
        "memory in GiB": _chart(r"^memory/"),
        "seconds that checkpoints held up training": _chart(r"^checkpoint/"),
    },
}
"""Group → chart → regular expressions of tags."""
