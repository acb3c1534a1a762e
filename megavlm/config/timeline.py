"""A run's phases in words: their steps, their policies, and where the learning rate begins anew.

Tested by `tests/config/test_reference.py`.
"""

from megavlm.config.run import RunConfig
from megavlm.engine.schedule import LearningRates, OptimizerConfig
from megavlm.routing.config import DENSE, Phase
from megavlm.routing.policies import Policy


def timeline(config: RunConfig) -> list[str]:
    """A line for each phase, steps counted from 1."""
    phases = config.routing.phases_in(config.optimizer.num_steps)
    begun = {phase.first_step: schedule for phase, schedule in LearningRates(config.optimizer, phases).schedules}
    return [
        f"phase {number} of {len(phases)}, steps {phase.first_step + 1} to {phase.end_step}: {_route(phase)}"
        + (f"; learning rate: {_rate(begun[phase.first_step])}" if phase.first_step in begun else "")
        for number, phase in enumerate(phases, 1)
    ]


def _route(phase: Phase) -> str:
    if not phase.full_strength or phase.policies == DENSE:
        return "everything is kept"
    words = f"reading {_policy(phase.understanding)}, drawing {_policy(phase.generation)}"
    return f"{words}, less and less kept until step {round(phase.full_from)}" if phase.warmup_steps else words


def _policy(policy: Policy) -> str:
    given = ", ".join(f"{name}={value}" for name, value in policy.model_dump(exclude_defaults=True).items())
    return f"{policy.policy}({given})" if given else policy.policy


def _rate(schedule: OptimizerConfig) -> str:
    up = f"up to {schedule.learning_rate:g} in {schedule.warmup_steps} steps" if schedule.warmup_steps else f"{schedule.learning_rate:g}"
    last = f"{schedule.learning_rate * schedule.min_lr_ratio:g}"
    down = {
        "constant": "then constant",
        "wsd": f"then constant, and down to {last} in {schedule.decay_steps}",
        "cosine": f"then along a cosine to {last}",
        "linear": f"then along a line to {last}",
    }[schedule.schedule]
    return f"{up}, {down}, {schedule.num_steps} steps in all"
