"""What a process must hold at the moment when it holds most: the end of the forward pass. Tested by `tests/planner/test_plan.py`."""

from dataclasses import dataclass

from megavlm.planner.load import Load
from megavlm.planner.model import Model


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, by what they are for."""

    base: float
    """Before there is a model: the program, the device's context, buffers of the communication."""
    parameters: float
    """Its part of the weights, for training and in float32."""
    gradients: float
    optimizer: float
    """Two moments."""
    gathered: float
    """Weights that are whole at one moment."""
    reduced: float
    """Gradients on their way to their parts."""
    activations: float
    logits: float
    """Of one chunk, with what the cross-entropy makes of them."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory_of(model: Model, load: Load, world_size: int, *, base_bytes: float, sequence_parallel: int = 1) -> Memory:
    """The most that a process holds.

    Args:
        model: What is trained, and how.
        load: The largest pack.
        world_size: Processes that share the states.
        base_bytes: Of a process before it has a model.
        sequence_parallel: Processes that share a pack.
    """
    part = model.num_parameters / world_size
    return Memory(
        base=base_bytes,
        parameters=part * (model.item_bytes + 4),
        gradients=part * 4,
        optimizer=part * 8,
        gathered=model.live_parameters * model.item_bytes if world_size > 1 or not model.on_cuda else 0.0,
        reduced=model.reduced_parameters * model.gradient_bytes,
        activations=activation_bytes(model, load) / sequence_parallel,
        logits=logit_bytes(model, load.labels / sequence_parallel),
    )


def activation_bytes(model: Model, load: Load) -> float:
    """What a pack's forward pass keeps for the backward pass, and what one layer needs to be computed again."""
    layer, held = model.layer, 0.0
    for stage, share in zip(load.stages, model.recomputed_shares, strict=True):
        per_row = share * layer.input_bytes + (1 - share) * layer.saved_bytes
        held += stage.num_layers * stage.rows * per_row
        # the full stream that the stage's rows are written back to
        held += load.tokens * layer.input_bytes
    if any(model.recomputed_shares):
        held += max(stage.rows for stage in load.stages) * layer.saved_bytes
    return held


def logit_bytes(model: Model, labels: float) -> float:
    """Logits of a chunk: as they come, in float32, their logarithms, and the gradient."""
    rows = labels / model.num_chunks
    in_float32 = 0 if model.item_bytes == 4 else 4
    return rows * model.vocabulary_size * (model.item_bytes + in_float32 + 4 + 4)
