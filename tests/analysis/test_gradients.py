"""Alignment of the tasks' gradients: where it is known, and against autograd."""

import numpy as np
import pytest
import torch

from megavlm.analysis.gradients import PARTS, WHOLE, align, alone, block_of, blocks_of, factors_of_tasks, products
from megavlm.routing.tasks import TASKS

PAIR = "understanding_generation"


def aligned(first, second):
    names, dots = products(["a"] * len(first), [first, second])
    return align(dots.numpy(), names, ["x", "y"])["x_y"]["a"]


def test_known_angles():
    g = [torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4.0)]
    norm = float(sum((p**2).sum() for p in g) ** 0.5)
    same = aligned(g, [3 * p for p in g])
    assert same.cosine == pytest.approx(1, abs=1e-6) and same.interference == 0
    assert same.norms == pytest.approx((norm, 3 * norm))
    orthogonal = aligned([torch.tensor([1.0, 2.0])], [torch.tensor([-2.0, 1.0])])
    assert orthogonal.cosine == pytest.approx(0, abs=1e-7) and orthogonal.interference == pytest.approx(0, abs=1e-7)
    against = aligned(g, [-0.5 * p for p in g])
    assert against.cosine == pytest.approx(-1) and against.interference == pytest.approx(0.5 * norm)
    # 135 degrees: of the smaller one, 1/sqrt(2) points against the larger
    half = aligned([torch.tensor([4.0, 0.0])], [torch.tensor([-1.0, 1.0])])
    assert half.cosine == pytest.approx(-(0.5**0.5)) and half.interference == pytest.approx(1)
    nothing = aligned(g, [0 * p for p in g])
    assert np.isnan(nothing.cosine) and nothing.interference == 0 and nothing.norms[1] == 0


def test_every_parameter_has_its_block(make_packs):
    _, backbone = make_packs({"routing.generation": {"policy": "mixture_of_depths"}, "routing.understanding": {"policy": "kv_injection"}})
    expected = {f"layer_{layer:02d}/{part}" for layer in range(4) for part in PARTS}
    assert set(blocks_of(backbone)) == expected | {"embedding", "final_norm", "head", "gates", "injectors"}
    assert block_of("causal_lm.model.layers.12.self_attn.k_norm.weight") == "layer_12/norms"
    assert block_of("causal_lm.model.layers.3.mlp.gate_proj.weight") == "layer_03/mlp"


@pytest.fixture
def two_tasks(make_packs):
    packs, backbone = make_packs(num=2)
    labels_t = sum(pack.task_labels for pack in packs)
    factor_t = np.array([0.1, 1.0, 1.0]) / np.maximum(labels_t, 1)
    factor_G = torch.tensor(np.append(np.tile(factor_t, 2), 0.0))
    return packs, backbone, factor_G, factors_of_tasks(factor_G, labels_t)


def test_the_tasks_gradients_add_up_to_that_of_the_step(two_tasks):
    packs, backbone, factor_G, factors = two_tasks
    assert list(factors) == ["understanding", "generation"], "no task without labels"
    found = alone(backbone, packs, factors)[PAIR]
    for pack in packs:
        (backbone(pack) * factor_G).sum().backward()
    squares = {}
    for (_name, p), block in zip(backbone.named_parameters(), blocks_of(backbone), strict=True):
        for b in (block, WHOLE):
            squares[b] = squares.get(b, 0.0) + float((p.grad**2).sum())
    assert set(found) == set(squares)
    for block, a in found.items():
        total = a.norms[0] ** 2 + a.norms[1] ** 2 + 2 * a.cosine * a.norms[0] * a.norms[1]
        assert total == pytest.approx(squares[block], rel=1e-5), block
    assert len({round(a.cosine, 3) for a in found.values()}) > 10, "blocks differ"


def test_identical_tasks_point_the_same_way_everywhere(two_tasks):
    packs, backbone, _, factors = two_tasks
    twins = dict.fromkeys(("understanding", "twin"), factors["understanding"])
    for block, a in alone(backbone, packs, twins)["understanding_twin"].items():
        assert a.cosine == pytest.approx(1, abs=1e-9) and a.interference == 0, block


def test_the_gates_loss_belongs_to_no_task():
    factors = factors_of_tasks(torch.arange(1.0, 8.0), np.ones(3))
    assert list(factors) == list(TASKS)
    assert [f.tolist() for f in factors.values()] == [[1, 0, 0, 4, 0, 0, 0], [0, 2, 0, 0, 5, 0, 0], [0, 0, 3, 0, 0, 6, 0]]
