"""A device that is none: tensors that say they are on `meta`, have real values, and fail where CUDA would fail or wait.

    with Device() as device:
        backbone = on_device(backbone)
        ...

What is caught: values read back to the host, sizes that depend on values, host tensors among device tensors, indices from the host, copies
that wait, work on the host inside the step, types that kernels do not mix, and arguments that the fused attention does not take.

Letters: L tokens of one sequence, G query heads that share a key.
"""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from megavlm.model.attention import fits_fused

META = torch.device("meta")
READS_BACK = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "isin",
    "repeat_interleave.Tensor",
}
WITHOUT_DETERMINISTIC_FORM = {"put_", "histc", "kthvalue", "median", "nll_loss2d_forward", "grid_sampler_2d", "_ctc_loss", "cumprod"}
"""On CUDA they raise under torch.use_deterministic_algorithms; of the list in torch's documentation, those that a step could ever call."""
INDEXING = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "index_select",
    "index_copy",
    "index_add",
    "gather",
    "scatter",
    "embedding",
}
NO_WORK = {"detach", "alias", "promote_types"}


class Mistake(AssertionError):
    """What CUDA would refuse, or wait for."""


class OnDevice(torch.Tensor):
    """A tensor of the device; ``value`` is what it holds."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        like = {"dtype": value.dtype, "device": META, "strides": value.stride(), "storage_offset": value.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, value.size(), **like)
        made.value = value
        return made

    def tolist(self):
        return self.cpu().tolist()  # torch's own has no answer for subclasses

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return (Device.current or Device(host_works=True)).run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, every operation is looked at.

    Args:
        host_works: Whether the host may compute by itself meanwhile, as between the passes of a step.
        counts_reads: What is read back is counted in ``reads`` and no mistake.
    """

    current: "Device | None" = None

    def __init__(self, host_works: bool = False, counts_reads: bool = False):
        super().__init__()
        self.host_works = host_works
        self.counts_reads = counts_reads
        self.reads = 0
        self.calls: Counter[str] = Counter()

    def __enter__(self):
        Device.current = self
        return super().__enter__()

    def __exit__(self, *error):
        Device.current = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        """Look at an operation, and carry it out on the values."""
        name = function._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        hosts = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "meta"
        if not ours and not to_device:
            if not self.host_works and name not in NO_WORK:
                raise Mistake(f"{function}: work on the host inside the step")
            return function(*args, **kwargs)
        self.calls[name] += 1
        self._look(function, name, args, kwargs, ours=ours, hosts=hosts)
        values = tree_map(lambda leaf: leaf.value if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        if to_device:
            values[1]["device"] = torch.device("cpu")
        out = ATTENTION.get(name, function)(*values[0], **values[1])
        if name == "_to_copy" and target is not None and not to_device:
            return out
        wrapped = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
        return return_and_correct_aliasing(function, args, kwargs, wrapped) if ours and name not in ATTENTION else wrapped

    def _read(self, what: str) -> None:
        self.reads += 1
        if not self.counts_reads:
            raise Mistake(what)

    def _look(self, function, name, args, kwargs, *, ours, hosts) -> None:
        overload = f"{name}.{function._overloadname}"
        if name in READS_BACK:
            self._read(f"{function}: reads a value back to the host")
        if name in SIZED_BY_VALUES or (overload in SIZED_BY_VALUES and kwargs.get("output_size") is None):
            self._read(f"{function}: a size depends on values, so the host waits for them")
        if name in WITHOUT_DETERMINISTIC_FORM or (name == "cumsum" and args[0].is_floating_point()):
            raise Mistake(f"{function}: has no deterministic form on CUDA")
        if name in ("_to_copy", "copy_", "to"):
            self._look_at_copy(function, name, args, kwargs, hosts)
            return
        if name in INDEXING:
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise Mistake(f"{function}: a mask as an index is a size that depends on values")
        if any(host.dim() for host in hosts):
            raise Mistake(f"{function}: a tensor of the host among those of the device")
        if hosts and name in INDEXING:
            raise Mistake(f"{function}: an index of the host")

    def _look_at_copy(self, function, name, args, kwargs, hosts) -> None:
        if name == "_to_copy":
            target, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
            leaves = isinstance(args[0], OnDevice) and target is not None and torch.device(target).type != "meta"
            enters = not isinstance(args[0], OnDevice)
        else:
            leaves, enters = not isinstance(args[0], OnDevice), isinstance(args[0], OnDevice) and bool(hosts)
            non_blocking = bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False)
        if leaves:
            self._read(f"{function}: a copy to the host, which waits")
        if enters and not non_blocking:
            raise Mistake(f"{function}: a copy to the device, for which the host waits")


def _by_sequence(cu_seqlens, *tensors):
    lengths = cu_seqlens.diff().tolist()
    return zip(*(tensor.float().split(lengths) for tensor in tensors))


def _weights(q_LHd, k_LHd, scale, window):
    groups = q_LHd.shape[1] // k_LHd.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q_LHd, k_LHd.repeat_interleave(groups, 1)) * scale
    everything = torch.ones(scores.shape[1:], dtype=torch.bool)
    hidden = everything.triu(1) if window[0] < 0 else everything.triu(1) | everything.tril(-window[0] - 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _check_attention(q, k, v, cu_q, cu_k, longest, enable_gqa) -> None:
    """What the fused kernel asks for (FlashAttention 2)."""
    assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}, (q.dtype, k.dtype, v.dtype)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and int(cu_q[0]) == 0 and int(cu_q[-1]) == len(q) == len(k) == len(v)
    assert bool((cu_q.diff() > 0).all()) and longest == int(cu_q.diff().max())
    assert q.shape[2] == k.shape[2] == v.shape[2] and fits_fused(q.shape[2]), q.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[1] == k.shape[1] or (enable_gqa and q.shape[1] % k.shape[1] == 0)


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, enable_gqa=False):
    _check_attention(q, k, v, cu_q, cu_k, max_q, enable_gqa)
    assert is_causal == (list(window) == [-1, 0]) and max_q == max_k and window[1] == 0
    groups = q.shape[1] // k.shape[1]
    parts = [
        torch.einsum("hqk,khd->qhd", _weights(q, k, scale, window), v.repeat_interleave(groups, 1))
        for q, k, v in _by_sequence(cu_q, q, k, v)
    ]
    return torch.cat(parts).to(q.dtype), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(grad, q, k, v, _out, _lse, cu_q, cu_k, max_q, _max_k, _is_causal, _rng, scale, window):
    _check_attention(q, k, v, cu_q, cu_k, max_q, True)
    groups, width = q.shape[1] // k.shape[1], q.shape[2]
    found = []
    for g, q_part, k_part, v_part in _by_sequence(cu_q, grad, q, k, v):
        p, k_all, v_all = _weights(q_part, k_part, scale, window), *(x.repeat_interleave(groups, 1) for x in (k_part, v_part))
        dp = torch.einsum("qhd,khd->hqk", g, v_all)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        dk, dv = torch.einsum("hqk,qhd->khd", ds, q_part), torch.einsum("hqk,qhd->khd", p, g)
        shared = [x.view(len(x), -1, groups, width).sum(2) for x in (dk, dv)]
        found.append([torch.einsum("hqk,khd->qhd", ds, k_all), *shared])
    return tuple(torch.cat(parts).to(grad.dtype) for parts in zip(*found))


def _formula(*_args, **_kwargs) -> int:
    """The kernel that `scaled_dot_product_attention` chooses: none, for a CPU's own kernels are not those of the device."""
    return 0


ATTENTION = {"_varlen_attn": _forward, "_varlen_attn_backward": _backward, "_fused_sdp_choice": _formula}


def on_device(thing):
    """A module with its parameters and buffers, or a pack, on the device."""
    if not isinstance(thing, nn.Module):
        return thing.map_tensors(OnDevice)
    for module in thing.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.data))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return thing


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of the device holds; for the test, which may look."""
    return tensor.value if isinstance(tensor, OnDevice) else tensor
