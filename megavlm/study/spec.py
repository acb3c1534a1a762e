"""What a study compares: a YAML file becomes a list of arms, each a recipe with a few settings changed.

The arms are {each task alone, all tasks together} x policies x seeds, and dense joint training at other lengths x seeds. An arm with one
task keeps the route of that task only; policies that then agree share the arm. It has fewer and smaller packs per step: in every step it
sees as many tokens of its task as the joint arm, over the same number of steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field, ValidationError

from megavlm.config import RunConfig, load_config, read_settings, read_value
from megavlm.config.document import foreign_values
from megavlm.config.mistakes import describe_all, message_of
from megavlm.data.pack.mixture import token_shares
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts
from megavlm.routing.config import DENSE as DENSE_POLICIES
from megavlm.routing.config import RoutingConfig
from megavlm.settings import Name, Number, PathText, Seed, Settings
from megavlm.system.files import find_resource, write_atomically

Data = Literal["joint", "understanding", "generation"]
JOINT: Final = "joint"
DENSE: Final = "dense"


class Metric(Settings):
    """One number in `evaluation.json`."""

    name: Name
    """Its name in the report."""
    path: str
    """Its dotted path in `evaluation.json`."""
    better: Literal["high", "low"] = "high"
    """Which way is good. Synergy is signed so that positive is good either way."""


class StudyTask(Settings):
    """One of the tasks whose synergy is measured."""

    sources: Annotated[list[str], Field(min_length=1)]
    """Sources of the recipe on which an arm with this task alone trains."""
    metrics: Annotated[list[Metric], Field(min_length=1)]
    """How it is judged; the report's figure and statements are about the first metric."""
    alone: dict[str, Any] = {}
    """Overrides (dotted path → value) of arms with this task alone, mostly to leave out the judging of the other task."""


class StudyConfig(Settings):
    """A study."""

    study_dir: PathText
    """Folder for the runs (`runs/`) and the report."""
    recipe: PathText
    """The recipe that all arms share: a path or a name."""
    overrides: dict[str, Any] = {}
    """Overrides (dotted path → value) of all arms."""
    tasks: Annotated[dict[Literal["understanding", "generation"], StudyTask], Field(min_length=2)]
    """The tasks."""
    policies: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Name → overrides: mostly `routing.understanding` and `routing.generation`, and `evaluation.route: trained` for models that cannot be
    judged dense. One policy must be called `dense`; the others are compared with it."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Each seed is one repetition of the whole study."""
    more_seeds: list[Seed] = []
    """Further repetitions, of dense training and the policies of `more_seeds_for` alone."""
    more_seeds_for: list[Name] = []
    """Names of policies that deserve them."""
    dense_lengths: list[Annotated[Number, Field(gt=0, lt=1)]] = []
    """Dense joint training is repeated with these shares of the steps, warm-up and schedule fitted to each. With the whole length they
    are the curve on which the cost to equal quality is read."""

    @property
    def lengths(self) -> dict[str, float]:
        """Name of the arm → share of the steps, the shortest first."""
        return {f"{DENSE}_{100 * share:g}": share for share in sorted(self.dense_lengths)}


@dataclass(frozen=True)
class Arm:
    """One run of a study."""

    policies: tuple[str, ...]
    """The policies that this run stands for."""
    data: Data
    """The task that it trains, or ``joint``."""
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)


def load_study(name: str, overrides: dict[str, Any] | None = None) -> StudyConfig:
    """Read a study.

    Args:
        name: Path of a YAML file, or the name of one that ships with megavlm.
        overrides: Changes of the study's own settings, such as ``seeds`` or ``study_dir``.

    Raises:
        ConfigError: With every mistake.
    """
    path = find_resource("recipes/studies", name, ".yaml")
    tree = read_settings(path) | {key: read_value(key, value) for key, value in (overrides or {}).items()}
    if foreign := [f"  {where or 'study'}: {what}" for where, what in foreign_values(tree)]:
        raise ConfigError(message_of(path, foreign))
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(message_of(path, describe_all(error, tree, StudyConfig))) from error
    if DENSE not in study.policies:
        raise ConfigError(f"{path}: policies has no {DENSE!r} to compare with\n  do:    add it: {DENSE}: {{}}")
    if unknown := [name for name in study.more_seeds_for if name not in study.policies]:
        raise ConfigError(
            f"{path}: more_seeds_for: there is no policy {', '.join(unknown)}\n  do:    name some of {', '.join(study.policies)}"
        )
    if taken := [name for name in study.lengths if name in study.policies]:
        raise ConfigError(f"{path}: dense_lengths makes arms {', '.join(taken)}, which policies has as well\n  do:    rename the policies")
    return study


def plan_arms(study: StudyConfig) -> list[Arm]:
    """All runs of a study, dense ones first, without repetitions."""
    arms: dict[str, Arm] = {}
    for seed in [*study.seeds, *study.more_seeds]:
        for policy, settings, data in _wanted(study, seed):
            config = _configure(study, settings, data, seed)
            same = config.model_copy(update={"run_dir": ""}).model_dump_json()
            if same in arms:
                known = arms[same]
                arms[same] = Arm((*known.policies, policy), data, seed, known.config)
            else:
                run_dir = str(Path(study.study_dir) / "runs" / f"{policy}-{data}-{seed}")
                arms[same] = Arm((policy,), data, seed, config.model_copy(update={"run_dir": run_dir}))
    return list(arms.values())


def _wanted(study: StudyConfig, seed: int) -> Iterator[tuple[str, dict[str, Any], Data]]:
    """(name, overrides, data) of every arm of a seed."""
    dense = study.policies[DENSE]
    everything: tuple[Data, ...] = (JOINT, *study.tasks)
    whole = load_config(study.recipe, study.overrides | dense).optimizer
    for data in everything:
        yield DENSE, dense, data
    for name, share in study.lengths.items():
        steps, warmup = max(1, round(share * whole.num_steps)), round(share * whole.warmup_steps)
        yield name, dense | {"optimizer.num_steps": steps, "optimizer.warmup_steps": warmup}, JOINT
    others = [name for name in study.policies if name != DENSE and (seed in study.seeds or name in study.more_seeds_for)]
    for name in others:
        for data in everything:
            yield name, study.policies[name], data


def _configure(study: StudyConfig, policy: dict[str, Any], data: Data, seed: int) -> RunConfig:
    base = study.overrides | {"seed": seed, "run_dir": study.study_dir}
    alone = {} if data == JOINT else study.tasks[data].alone
    joint = load_config(study.recipe, base | policy | alone)
    if data == JOINT:
        return joint
    wanted = study.tasks[data].sources
    if unknown := [name for name in wanted if name not in joint.data.sources]:
        raise ConfigError(f"tasks.{data}.sources: {study.recipe} has no source {', '.join(unknown)}\n  do:    correct the name")
    shares = dict(zip(joint.data.sources, token_shares(Parts(joint).with_mixture().mixture, joint.data)))
    lanes = joint.data.num_lanes * sum(shares[name] for name in wanted)
    num_lanes = max(1, round(lanes))
    sources = {name: source for name, source in joint.data.sources.items() if name in wanted}
    data_part = {"sources": sources, "num_lanes": num_lanes, "pack_tokens": round(joint.data.pack_tokens * lanes / num_lanes)}
    routing, evaluation = joint.routing, joint.evaluation
    routing = routing.only(data)
    if routing.trained == DENSE_POLICIES:
        # the policy has no route left: this is the dense arm, unless its phases have schedules of their own
        routing = routing if any(phase.optimizer for phase in routing.phases) else RoutingConfig()
        evaluation = evaluation.model_copy(update={"route": "dense"})
    update = {"data": joint.data.model_copy(update=data_part), "routing": routing, "evaluation": evaluation}
    return joint.model_copy(update=update)


def write_array(arms: list[Arm], file: Path) -> None:
    """Write arms as the list of overrides that `megavlm submit --array` reads; each run's folder is named as here."""
    runs = [{"name": arm.folder.name, **arm.config.model_dump(mode="json", exclude={"run_dir"})} for arm in arms]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, yaml.safe_dump(runs, sort_keys=False, default_flow_style=None, width=110))
