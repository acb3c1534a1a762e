"""Published files name every expert's matrices one by one; models of `transformers` 5 hold those of a layer as one tensor.

Tested by `tests/parts/test_export.py`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""Tensor of a model → the names of an expert's matrices that are laid one below the other in it, by families."""


class Stored(NamedTuple):
    """A tensor of a file."""

    shape: torch.Size
    read: Callable[[], torch.Tensor]


def with_stacked_experts(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same, by the names of models: experts of a layer as one tensor each. What does not make a whole keeps its name.

    Args:
        stored: Tensors of all files of a folder.
    """
    found: dict[str, Stored] = {}
    layers: dict[str, dict[str, dict[int, Stored]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in stored.items():
        # mixtral's files have another name for the block
        renamed = name.replace(".block_sparse_moe.", ".mlp.")
        if match := EXPERT.fullmatch(renamed):
            layers[match[1]][match[3]][int(match[2])] = tensor
        found[renamed] = tensor
    for layer, matrices in layers.items():
        for target, families in PARTS.items():
            for names in families:
                experts = [matrices[name] for name in names if _is_whole(matrices.get(name, {}))]
                if len(experts) == len(names) and len({len(of_one) for of_one in experts}) == 1:
                    found[f"{layer}.{target}"] = _stacked(experts)
                    for name in names:
                        for number in matrices[name]:
                            del found[f"{layer}.{number}.{name}.weight"]
    return found


def _is_whole(of_experts: dict[int, Stored]) -> bool:
    return bool(of_experts) and sorted(of_experts) == list(range(len(of_experts)))


def _stacked(matrices: list[dict[int, Stored]]) -> Stored:
    """Of each expert its matrices one below the other."""
    rows = sum(of_experts[0].shape[0] for of_experts in matrices)
    return Stored(torch.Size((len(matrices[0]), rows, matrices[0][0].shape[1])), partial(_read, matrices))


def _read(matrices: list[dict[int, Stored]]) -> torch.Tensor:
    return torch.stack([torch.cat([of_experts[number].read() for of_experts in matrices]) for number in sorted(matrices[0])])
