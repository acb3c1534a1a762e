"""The tags that every report of a run has, so that a recipe can name one before there is a report."""

import re
from collections.abc import Iterable

from megavlm.data.pack.lane import COUNTS
from megavlm.monitor.metrics import TOTALS
from megavlm.routing.tasks import TASKS

ALWAYS = (
    *("time/step_s", "time/data_wait_share", "throughput/tokens_per_s", "throughput/samples_per_s"),
    *(
        "throughput/executed_tflops_per_s",
        "throughput/recomputed_tflops_per_s",
        "throughput/dense_equivalent_tflops_per_s",
        "routing/flops_share",
        "routing/phase",
    ),
    *("throughput/executed_mfu", "throughput/dense_equivalent_mfu"),
    *("balance/planned_max_over_mean", "balance/probe_max_over_median", "balance/data_wait_max_s", "balance/measured_max_over_mean"),
    *("optimizer/learning_rate", "optimizer/gradient_norm", "faults/skipped_steps", "memory/peak_gib", "memory/host_gib"),
    *(f"data/{count}" for count in COUNTS),
    *(f"totals/{total}" for total in TOTALS),
)
_STAGE = re.compile(rf"kept_tokens/({'|'.join(TASKS[:2])})/stage_\d+_layers_\d+-\d+")


def known_tags(sources: Iterable[str]) -> list[str]:
    """The tags of a report, without those of stages; tasks that the sources do not have are left out of it.

    Args:
        sources: Names of the sources.
    """
    sources = list(sources)
    of_tasks = [tag for task in TASKS for tag in (f"loss/{task}", f"routing/flops_share_of_{task}")]
    by_source = [f"loss_by_source/{source}/{task}" for source in sources for task in TASKS if len(sources) > 1]
    return [*of_tasks, *by_source, *ALWAYS]


def is_tag(tag: str, sources: Iterable[str]) -> bool:
    """Whether a run with these sources reports the tag."""
    return tag in known_tags(sources) or _STAGE.fullmatch(tag) is not None
