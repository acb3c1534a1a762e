"""Packs come with their copies, in order. The copies' own stream needs CUDA."""

import pytest
import torch

from megavlm.data.pack.ahead import copied_ahead
from tests.routing.layouts import make_pack

LAYOUTS = [[[("TEXT", n, 1)], [("image", 2, 2), ("TEXT", 2, 1)]] for n in (3, 7, 5)]
HERE = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", HERE)
def test_every_pack_comes_with_its_copy(device):
    packs = [make_pack(layout, "random_ltd") for layout in LAYOUTS]
    packs = [pack.pin_memory() for pack in packs] if device == "cuda" else packs
    found = list(copied_ahead(packs, torch.device(device)))
    assert [pack for pack, _ in found] == packs
    for pack, here in found:
        assert here.tokens_T.device.type == device and here.tokens_T.cpu().equal(pack.tokens_T)
        for stage, copy in zip(pack.route.stages, here.route.stages):
            assert copy.active_K is None or copy.active_K.cpu().equal(stage.active_K)
