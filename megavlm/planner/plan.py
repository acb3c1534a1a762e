"""The plan of a run on a number of GPUs: memory, time and what to change, and a table over other numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megavlm.config import RunConfig
from megavlm.costs import BACKWARD_FACTOR
from megavlm.data.pack.mixture import target_flops, token_shares
from megavlm.data.pack.pack import Costing
from megavlm.data.tools.simulate import Situation, standard_mixture
from megavlm.errors import ConfigError, MegavlmError
from megavlm.model.configuration import read_configuration
from megavlm.parts.parts import Parts, situation_of
from megavlm.planner.load import Imbalance, Load, average_load, dense_of, largest_load
from megavlm.planner.memory import Memory, memory_of
from megavlm.planner.model import Model
from megavlm.planner.rates import Rates
from megavlm.planner.steptime import Setup, StepTime, step_time
from megavlm.routing.phases import Phases
from megavlm.routing.policies import PARTIAL, Dense

STANDARD_CODES = 8192
"""Image codes of a run that is planned without its files."""
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROOM = 0.92
"""Share of a device's memory that a run may count on: the allocator leaves gaps."""


@dataclass(frozen=True)
class Outlook:
    """A run on some number of processes."""

    world_size: int
    packs_per_step: int
    memory: Memory
    fits: bool
    time: StepTime
    imbalance: float
    executed_mfu: float | None
    """With the route, and what is computed again."""
    dense_equivalent_mfu: float | None
    """What the same packs would take without a route."""
    gpu_hours: float
    """Of the whole run."""
    tokens_per_s: float

    def as_document(self) -> dict[str, Any]:
        return asdict(self) | {"step_s": self.time.total, "memory_bytes": self.memory.total}


class Planner:
    """Plans a recipe.

    Args:
        config: The recipe.
        rates: Of the device.
        on_cuda: Whether the device is a GPU.
        standard_data: Without the recipe's files: the standard mixture of `megavlm data simulate`, and `STANDARD_CODES` image codes behind
            the architecture's ``vocab_size``.
        pack_build_s: Seconds to build a pack, where they are known.
        sequence_parallel: Processes that share a pack.
    """

    def __init__(
        self,
        config: RunConfig,
        rates: Rates,
        *,
        on_cuda: bool = True,
        standard_data: bool = False,
        pack_build_s: float = 0.0,
        sequence_parallel: int = 1,
    ):
        self.config = config
        self.rates = rates
        self.on_cuda = on_cuda
        self.pack_build_s = pack_build_s
        self.sequence_parallel = sequence_parallel
        self.situation = standard_situation(config) if standard_data else situation_of(config)
        _check_known(self.situation.costing)
        self.described = read_configuration(config.model.architecture, self.situation.costing.shape.vocabulary_size)
        shape = self.situation.costing.shape
        self.dense = dense_of(self.situation, Costing(Phases.always(Dense(), Dense(), shape.num_layers), shape))
        self._loads: dict[tuple[Costing, int], Load] = {}
        self.imbalance = Imbalance(self.situation)
        self.dense_imbalance = Imbalance(self.dense)
        self.model(config, self.situation).check_sequence_parallel(sequence_parallel)

    def model(self, config: RunConfig, situation: Situation) -> Model:
        return Model(config, self.described, tuple(situation.costing.phases.bounds), self.on_cuda, self.rates.memory_bytes)

    def outlook(self, world_size: int, config: RunConfig | None = None, *, dense: bool = False) -> Outlook:
        """The run on so many processes.

        Args:
            world_size: Processes.
            config: Another recipe than the planned one, with the same data and route.
            dense: Without the route: the same tokens in every step, every one of them active in all layers.
        """
        config = config or self.config
        situation, imbalance = (self.dense, self.dense_imbalance) if dense else (self.situation, self.imbalance)
        data = situation.config.model_copy(update={"pack_tokens": config.data.pack_tokens})
        situation = Situation(situation.mixture, situation.costing, data, situation.seed, situation.at_step)
        model, load = self.model(config, situation), self._load(situation)
        # packs that share ranks are fewer
        num_ranks = world_size // self.sequence_parallel
        packs = max(config.data.num_lanes, num_ranks)
        factor = imbalance.factor(min(num_ranks, packs))
        time = step_time(model, load, Setup(
            rates=self.rates,
            world_size=world_size,
            packs_per_rank=packs / num_ranks,
            imbalance=factor,
            pack_build_s=self.pack_build_s,
            sequence_parallel=self.sequence_parallel,
        ))  # fmt: skip
        memory = memory_of(
            model,
            largest_load(load, situation),
            world_size,
            base_bytes=self.rates.host.base_bytes,
            sequence_parallel=self.sequence_parallel,
        )
        peak = self.rates.peak_flops_per_s
        executed, dense_equivalent = self._flops(model, load, packs)
        return Outlook(
            world_size=world_size,
            packs_per_step=packs,
            memory=memory,
            fits=memory.total <= ROOM * self.rates.memory_bytes,
            time=time,
            imbalance=factor,
            executed_mfu=executed / time.total / world_size / peak if peak else None,
            dense_equivalent_mfu=dense_equivalent / time.total / world_size / peak if peak else None,
            gpu_hours=time.total * config.optimizer.num_steps * world_size / 3600,
            tokens_per_s=load.tokens * packs / time.total,
        )

    def _load(self, situation: Situation) -> Load:
        """The average pack, found out once."""
        key = situation.costing, situation.config.pack_tokens
        return self._loads[key] if key in self._loads else self._loads.setdefault(key, average_load(situation))

    @cached_property
    def _dense_flops_per_token(self) -> float:
        """Forward FLOPs of the average pack without a route, head included."""
        shares = token_shares(self.dense.mixture, self.dense.config)
        pack = target_flops(self.dense.mixture, shares, self.dense.costing, self.dense.config, step=self.dense.at_step)
        return float(pack.sum()) / self._load(self.dense).tokens

    def _flops(self, model: Model, load: Load, packs: int) -> tuple[float, float]:
        """Of a step, all processes together: executed, and dense-equivalent."""
        shape = model.shape
        head = load.labels * shape.head_flops_per_row
        layers, again = 0.0, 0.0
        for stage, share in zip(load.stages, model.recomputed_shares, strict=True):
            square = shape.layer_flops_per_square * float(stage.samples_L @ stage.lengths_L.astype(float) ** 2)
            flops = stage.num_layers * (shape.layer_flops_per_token * stage.rows + square)
            layers, again = layers + flops, again + share * flops
        dense = load.tokens * self._dense_flops_per_token
        return packs * ((1 + BACKWARD_FACTOR) * (layers + head) + again), packs * (1 + BACKWARD_FACTOR) * dense

    def table(self, world_sizes: Sequence[int] = WORLDS) -> list[Outlook]:
        """The same run on other numbers of processes; every process has one pack of a step at least."""
        return [self.outlook(world_size) for world_size in world_sizes if world_size % self.sequence_parallel == 0]

    def checkpointing(self, world_size: int) -> list[tuple[bool | int, Outlook]]:
        """What the choices of ``model.activation_checkpointing`` give."""
        choices: list[bool | int] = [False, 4, 2, True]
        return [(choice, self.outlook(world_size, self._with(activation_checkpointing=choice))) for choice in choices]

    def remedies(self, world_size: int) -> Iterator[str]:
        """What would make it fit, the cheapest first."""
        for choice, outlook in self.checkpointing(world_size):
            if outlook.fits:
                yield f"--model.activation_checkpointing={str(choice).lower()}: {outlook.memory.total / 1e9:.0f} GB"
                break
        tokens = self.config.data.pack_tokens
        for pack_tokens in (tokens // 2, tokens // 4, tokens // 8):
            data = self.config.data.model_copy(update={"pack_tokens": pack_tokens})
            longest = max(layout.num_tokens for source in self.situation.mixture.values() for _, layout in source.layouts)
            outlook = self.outlook(world_size, self.config.model_copy(update={"data": data})) if pack_tokens >= longest else None
            if outlook and outlook.fits:
                yield f"--data.pack_tokens={pack_tokens}: {outlook.memory.total / 1e9:.0f} GB"
                break
        for more in (2 * world_size, 4 * world_size, 8 * world_size):
            if (outlook := self.outlook(more)).fits:
                yield f"--gpus {more}: {outlook.memory.total / 1e9:.0f} GB"
                break

    def _with(self, **settings: Any) -> RunConfig:
        return self.config.model_copy(update={"model": self.config.model.model_copy(update=settings)})


def _check_known(costing: Costing) -> None:
    """Refuse what step times by formula do not know.

    Raises:
        MegavlmError: Naming it.
    """
    hows = {of_task.how for plan in costing.phases.plans for plans in plan.plans for of_task in plans if of_task.keep_ratio < 1}
    if hows & set(PARTIAL):
        raise MegavlmError(
            "routing: tokens that go through a part of a layer (visible_bypass, sparse_mlp) are not in the planner's step times yet\n"
            "  do:    plan with another policy; `megavlm data simulate RECIPE` counts the FLOPs of this one"
        )
    if costing.shape.windows:
        raise MegavlmError(
            "model.architecture: sliding windows are not in the planner's step times yet\n"
            "  do:    plan with --model.architecture.sliding_window=null for an upper bound, or with another family"
        )


def standard_situation(config: RunConfig) -> Situation:
    """The recipe's model, route and packs on the standard mixture.

    Raises:
        ConfigError: If the architecture does not say how many ids its texts have, or the packs are too short.
    """
    num_text = config.model.architecture.get("vocab_size")
    if not isinstance(num_text, int):
        raise ConfigError("model.architecture: planning without files needs its vocab_size\n  do:    add it, or plan with the data there")
    mixture = standard_mixture()
    longest = max(layout.num_tokens for source in mixture.values() for _, layout in source.layouts)
    if longest > config.data.sample_tokens:
        raise ConfigError(
            f"data.pack_tokens: samples of the standard mixture have up to {longest} tokens, a pack takes {config.data.sample_tokens}\n"
            f"  do:    plan with --data.pack_tokens={longest} or more, or with the data there"
        )
    source = next(iter(config.data.sources.values())).model_copy(update={"weight": 1.0, "repeat": None})
    data = config.data.model_copy(update={"sources": dict.fromkeys(mixture, source)})
    shape = Model(config, read_configuration(config.model.architecture, num_text + STANDARD_CODES), (), True).shape
    phases = Parts(config).phases
    return Situation(mixture, Costing(phases, shape), data, config.seed, phases.typical_step)
