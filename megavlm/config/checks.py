"""What settings say of each other: contradictions that no single setting shows, found when the recipe is read.

Tested by `tests/test_config.py`.
"""

import difflib
from collections.abc import Iterator

from megavlm.config.document import shown
from megavlm.config.run import RunConfig
from megavlm.engine.schedule import LearningRates
from megavlm.monitor.tags import is_tag, known_tags
from megavlm.routing.config import RoutingConfig
from megavlm.routing.tasks import TASKS

MOST_CHUNKS = 1024
"""Calls of the output head per pack."""
SLACK = 1e-3
"""So far the fractions of phases may be from 1: 0.333 is written for a third."""
SMALLEST_SHARE = 1e-9
"""Least share of a source; one with less would never be drawn."""


def contradictions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted path, what is wrong and what to do) of everything that cannot be together."""
    yield from _optimizer(config)
    yield from _routing(config)
    yield from _data(config)
    yield from _best(config)
    if (late := max(config.profile.steps or [0])) > config.optimizer.num_steps:
        yield "profile.steps", f"there is no step {late} among {config.optimizer.num_steps} (optimizer.num_steps); leave it out"
    weights = config.loss.task_weights
    if config.loss.balance_weight is not None and not config.model.has_experts:
        yield "loss.balance_weight", "this model.architecture has no experts to balance; leave it out"
    if not any(weights.get(task, 1.0) for task in TASKS):
        yield "loss.task_weights", "all are 0, so there is nothing to learn; give one task a weight"


def _optimizer(config: RunConfig) -> Iterator[tuple[str, str]]:
    num_steps = config.optimizer.num_steps
    for phase, schedule in LearningRates(config.optimizer, config.routing.phases_in(num_steps)).schedules:
        place = f"{phase.place}.optimizer" if phase.optimizer else "optimizer"
        whole = f"the run of {num_steps} (optimizer.num_steps)"
        steps = (
            whole if schedule.num_steps == num_steps else f"its schedule of {schedule.num_steps}, which ends where a phase begins another"
        )
        if schedule.warmup_steps > schedule.num_steps:
            yield f"{place}.warmup_steps", f"the warm-up of {schedule.warmup_steps} steps is longer than {steps}; lower it"
        elif schedule.schedule == "wsd" and schedule.warmup_steps + schedule.decay_steps > schedule.num_steps:
            decay = f"the decay of {schedule.decay_steps} steps and the warm-up of {schedule.warmup_steps}"
            yield f"{place}.decay_fraction", f"{decay} are longer than {steps}; lower one of them"
        if schedule.learning_rate * schedule.weight_decay >= 1:
            yield (
                "optimizer.weight_decay",
                f"times {place}.learning_rate it is 1 or more, so one step erases the weights; lower one of them",
            )


def _routing(config: RunConfig) -> Iterator[tuple[str, str]]:
    routing = config.routing
    if routing.warmup_fraction + routing.dense_finish_fraction > 1:
        yield "routing.warmup_fraction", "with dense_finish_fraction it is more than the whole run; lower one of them"
    if not routing.phases:
        return
    unlisted = ("understanding", "generation", "warmup_fraction", "dense_finish_fraction")
    if given := [name for name in unlisted if getattr(routing, name) != RoutingConfig.model_fields[name].default]:
        names = " and ".join(f"routing.{name}" for name in given)
        yield "routing.phases", f"the run has a list of phases, and {names} beside it; say the whole route in phases, or without them"
    whole = sum(phase.fraction for phase in routing.phases)
    if abs(whole - 1) > SLACK:
        yield "routing.phases", f"their fractions add up to {whole:.6g}; make it 1"
        return
    num_steps = config.optimizer.num_steps
    there = {phase.place for phase in routing.phases_in(num_steps)}
    for number, phase in enumerate(routing.phases):
        if f"routing.phases.{number}" not in there:
            yield (
                f"routing.phases.{number}.fraction",
                f"{phase.fraction:g} of {num_steps} steps (optimizer.num_steps) is no step; make it larger, or leave the phase out",
            )


def _best(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What is best must be said: by default nothing is reported but losses of training, which rank no checkpoint."""
    rule, sources = config.checkpoint, list(config.data.sources)
    if not rule.keep_best:
        return
    if rule.best_metric is None:
        yield (
            "checkpoint.best_metric",
            "keep_best needs the tag that it ranks by; name one that is reported, such as validation/loss (needs validation.sources) or"
            " loss/generation (the loss of training)",
        )
        return
    held_out = _validation_tags(config)
    if rule.best_metric in held_out:
        if rule.every_steps % config.validation.every_steps:
            yield (
                "checkpoint.best_metric",
                f"a checkpoint keeps {rule.best_metric} only if it was measured at its step; make checkpoint.every_steps"
                f" ({rule.every_steps}) a multiple of validation.every_steps ({config.validation.every_steps})",
            )
    elif not is_tag(rule.best_metric, sources):
        nearest = difflib.get_close_matches(rule.best_metric, [*held_out, *known_tags(sources)], n=1, cutoff=0)[0]
        yield "checkpoint.best_metric", f"this run reports no {shown(rule.best_metric)}. Did you mean {nearest}?"


def _validation_tags(config: RunConfig) -> list[str]:
    sources = list(config.validation.sources)
    by_source = [f"validation_by_source/{source}/{task}" for source in sources for task in TASKS if len(sources) > 1]
    return ["validation/loss", *(f"validation/{task}" for task in TASKS), *by_source] if sources else []


def _data(config: RunConfig) -> Iterator[tuple[str, str]]:
    data = config.data
    num_chunks = -(-data.pack_tokens // config.loss.chunk_rows)
    if num_chunks > MOST_CHUNKS:
        yield (
            "loss.chunk_rows",
            f"a pack of {data.pack_tokens} tokens would go through the output head in {num_chunks} parts;"
            f" give at least {-(-data.pack_tokens // MOST_CHUNKS)}",
        )
    has_repeat = [source.repeat is not None for source in data.sources.values()]
    if any(has_repeat) and not all(has_repeat):
        yield "data.sources", "repeat is given for some sources only; give it, or a weight, to all"
    if not any(has_repeat):
        yield from _hardly_drawn(config)


def _hardly_drawn(config: RunConfig) -> Iterator[tuple[str, str]]:
    weights = {name: source.weight ** (1 / config.data.temperature) for name, source in config.data.sources.items()}
    for name, weight in weights.items():
        if weight < SMALLEST_SHARE * sum(weights.values()):
            yield f"data.sources.{name}.weight", "is so small beside the others that the source never comes up; leave it out or raise it"
