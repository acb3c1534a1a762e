import pytest
import torch

from megavlm.model.attention import Scoring, packed_attention
from megavlm.routing.route import Sequences

LENGTHS = [5, 1, 17, 64, 2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def reference(q, k, v, lengths, scale, *, bias, window=100, softcap=None):
    """Dense, masked, float32, written out."""
    q, k, v = (x.float() for x in (q, k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    causal = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
    mask = causal & (document[:, None] == document)
    mask &= ~torch.ones_like(mask).tril(-window)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    scores = scores + bias
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", [{}, {"window": 7}, {"softcap": 0.6}, {"window": 1, "softcap": 2.0}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_equals_the_dense_masked_reference_forward_and_backward(device, dtype, tolerance, form, with_bias):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.of(torch.tensor(LENGTHS).numpy()).map_tensors(lambda tensor: tensor.to(device))
    tensors = [torch.randn(sum(LENGTHS), 3, 16, generator=generator).to(device, dtype) for _ in range(4)]
    inputs, weights = [x.requires_grad_() for x in tensors[:3]], tensors[3].float()
    results = []
    bias = torch.rand(sum(LENGTHS), generator=generator).to(device) * with_bias
    given = {"scoring": Scoring(0.3, **form), "bias_T": bias if with_bias else None}
    for attend in (lambda: packed_attention(*inputs, sequences, **given), lambda: reference(*inputs, LENGTHS, 0.3, bias=bias, **form)):
        output = attend()
        results.append([output.float(), *torch.autograd.grad((output.float() * weights).sum(), inputs)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
