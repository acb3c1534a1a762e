"""The small functions between matrix products, compiled: norms, rotary embedding, gated activation. Each is one kernel instead of several.

A module is changed only if a formula of this file gives its own result bit by bit, in a trial; every other one is left as it is. What a
compiled function gives is that of the formula up to rounding. Whole layers are not compiled: ZeRO's hooks would break their graph.

Letters: R rows of a trial, F columns of an MLP.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from functools import cache
from types import FunctionType, MethodType
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call

Part = Literal["norm", "rotary", "mlp", "loss"]
"""What can be compiled; `megavlm.model.loss` has the last."""
PARTS: tuple[Part, ...] = ("norm", "rotary", "mlp", "loss")
ROTARY = "apply_rotary_pos_emb"
"""What the attention of a family calls, by its name in the family's file."""
R, D, F = 64, 32, 48
"""Sizes of a trial; what a formula gives does not depend on them."""


def fuse(causal_lm: nn.Module, parts: Collection[Part]) -> dict[Part, int]:
    """Give modules of a decoder a ``forward`` with compiled functions.

    Args:
        causal_lm: Changed in place; may be divided by ZeRO-3.
        parts: Kinds of functions.

    Returns:
        How many modules were changed, of each kind.
    """
    changed: dict[Part, int] = {}
    # a trial of a module with dropout draws random numbers
    with torch.random.fork_rng(devices=[]):
        for part, find in FINDERS.items():
            for module in causal_lm.modules() if part in parts else ():
                if (forward := find(module)) is not None:
                    module.forward = MethodType(forward, module)
                    changed[part] = changed.get(part, 0) + 1
    return changed


@cache
def compiled(function: Callable) -> Callable:
    """One compiled function for all who use it, with one graph for all numbers of rows: they differ from pack to pack."""
    return torch.compile(function, dynamic=True)


def scaled_after(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm whose weight is applied after the return to ``x``'s precision: Llama's."""
    return weight * _normed(x, eps).to(x.dtype)


def scaled_before(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm whose weight is applied in float32: OLMo 2's."""
    return (weight * _normed(x, eps)).to(x.dtype)


def scaled_by_one_more(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm whose weight is a difference from 1, applied in float32: Gemma's."""
    return (_normed(x, eps) * (1.0 + weight.float())).to(x.dtype)


def _normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _norm(module: nn.Module) -> Callable | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    x_RD, weight = _random(R, D), _random(D)
    with torch.no_grad():
        expected = functional_call(module, {"weight": weight}, (x_RD,))
        formulas = (scaled_after, scaled_before, scaled_by_one_more)
        formula = next((formula for formula in formulas if formula(x_RD, weight, eps).equal(expected)), None)
    if formula is None:
        return None
    fast = compiled(formula)
    return lambda self, x: fast(x, self.weight, eps)


def _rotary(module: nn.Module) -> Callable | None:
    plain = type(module).forward
    if ROTARY not in getattr(getattr(plain, "__code__", None), "co_names", ()):
        return None
    # the same code, for this module alone, that finds the compiled function under the name
    names = plain.__globals__ | {ROTARY: compiled(plain.__globals__[ROTARY])}
    fast = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    fast.__kwdefaults__ = plain.__kwdefaults__
    return fast


def _mlp(module: nn.Module) -> Callable | None:
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not isinstance(activation, nn.Module) or any(True for _ in activation.parameters()):
        return None
    children = {name for name, _ in module.named_children()}
    if children >= {"gate_proj", "up_proj", "down_proj"}:
        gated, forward = _gated(_shared(activation)), _apart
        heights = {"gate_proj": F, "up_proj": F, "down_proj": D}
    elif children >= {"gate_up_proj", "down_proj"}:
        gated, forward = _gated_halves(_shared(activation)), _in_one
        heights = {"gate_up_proj": 2 * F, "down_proj": D}
    else:
        return None
    widths = dict.fromkeys(heights, D) | {"down_proj": F}
    weights = {}
    for name, _ in module.named_parameters():
        linear, kind = name.split(".")
        weights[name] = _random(heights[linear], widths[linear]) if kind == "weight" else _random(heights[linear])
    x_RD = _random(R, D)
    with torch.no_grad():
        expected = functional_call(module, weights, (x_RD,))
        module.forward = MethodType(lambda self, x: forward(self, x, gated), module)
        is_same = functional_call(module, weights, (x_RD,)).equal(expected)
        del module.forward
    if not is_same:
        return None
    fast = compiled(gated)
    return lambda self, x: forward(self, x, fast)


def _random(*shape: int) -> torch.Tensor:
    """In half precision: there every order of roundings gives other bits."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").bfloat16()


def _apart(mlp, x: torch.Tensor, gated: Callable) -> torch.Tensor:
    return mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))


def _in_one(mlp, x: torch.Tensor, gated: Callable) -> torch.Tensor:
    return mlp.down_proj(gated(mlp.gate_up_proj(x)))


@cache
def _gated(activation: nn.Module) -> Callable:
    return lambda gate, up: activation(gate) * up


@cache
def _gated_halves(activation: nn.Module) -> Callable:
    def gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return up * activation(gate)

    return gated


_activations: dict[type, nn.Module] = {}


def _shared(activation: nn.Module) -> nn.Module:
    """One activation of its type, for the MLPs of all layers, that ZeRO hangs no hooks on."""
    return _activations.setdefault(type(activation), deepcopy(activation))


FINDERS: dict[Part, Callable[[nn.Module], Callable | None]] = {"norm": _norm, "rotary": _rotary, "mlp": _mlp}
