"""What a step does on CUDA, without a GPU: nothing waits for the device, nothing mixes devices or types.

Two ways. *meta*: parameters and pack have no values, so that reading one is impossible; it takes wrong types. *Device*: see
`tests/cuda_without_gpu/device.py`. Both take the branch of the attention that CUDA takes.

Letters: G sums that the backbone gives.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.nn import functional

from megavlm.data.pack.pack import build_pack
from megavlm.engine.guard import Guard
from megavlm.engine.signals import Wish
from megavlm.model import attention
from megavlm.model.attention import Scoring, packed_attention
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.decoding import Decoder
from megavlm.monitor.metrics import Meters
from megavlm.monitor.stragglers import Stragglers
from megavlm.parts.parts import Parts
from megavlm.parts.trained import to_bfloat16
from megavlm.routing.route import Sequences
from megavlm.system import world as world_module
from megavlm.system.world import World
from megavlm.training.trainer import Trainer
from tests.cuda_without_gpu.device import META, Device, Mistake, OnDevice, on_device, value_of
from tests.model.test_backbone import MIXED
from tests.model.test_decoding import DRAWN
from tests.routing.layouts import EVEN, NUM_LAYERS, PATCHES, POLICIES, VOCABULARY, costing, make_pack, make_samples, phases

FACTORS = (0.3, 1.0, 2.0, 0.5)


@pytest.fixture(autouse=True)
def _the_branch_that_cuda_takes(monkeypatch):
    monkeypatch.setattr(attention, "takes_fused", lambda q_THd: q_THd.device == META and q_THd.dtype == torch.bfloat16)


def make_backbone(policy="dense", num_kv_heads=2, window=None, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "head_dim": 8, "initializer_range": 0.2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": num_kv_heads}
    family = {"model_type": "qwen3"} if window is None else {"model_type": "mistral", "sliding_window": window}
    causal_lm = make_causal_lm(family | sizes, VOCABULARY)
    backbone = Backbone(causal_lm, phases(policy), num_sources=1, max_labels=200, chunk_rows=64, **options)
    to_bfloat16(backbone)
    return backbone


def layout_for(policy):
    return EVEN if policy in PATCHES else MIXED


def loss_and_gradient(backbone, pack, factors_G):
    loss = (backbone(pack) * factors_G).sum()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}


AND_PATCHES = pytest.mark.parametrize("policy", [*POLICIES, *PATCHES])


@AND_PATCHES
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_on_meta(policy, num_kv_heads):
    backbone = make_backbone(policy, num_kv_heads).to(META)
    pack = make_pack(layout_for(policy), policy).map_tensors(lambda tensor: tensor.to(META))
    loss, gradients = loss_and_gradient(backbone, pack, torch.empty(4, device=META))
    assert loss.device == META and len(gradients) > 40
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}


WINDOWED = [("dense", 5), ("kv_injection_both", 5)]


@pytest.mark.parametrize(("policy", "window"), [*((policy, None) for policy in [*POLICIES, *PATCHES]), *WINDOWED])
def test_nothing_waits_and_nothing_mixes_in_the_passes(policy, window):
    """Backbone, router and loss; the values are those of the CPU's own branch."""
    pack, factors_G = make_pack(layout_for(policy), policy), torch.tensor(FACTORS)
    expected, expected_gradients = loss_and_gradient(make_backbone(policy, window=window), pack, factors_G)
    backbone, pack, factors_G = on_device(make_backbone(policy, window=window)), on_device(pack), OnDevice(factors_G)
    with Device() as device:
        loss, gradients = loss_and_gradient(backbone, pack, factors_G)
    assert float(value_of(loss).detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    assert device.calls["_varlen_attn"] >= NUM_LAYERS and device.calls["_varlen_attn_backward"] >= NUM_LAYERS
    assert gradients.keys() == expected_gradients.keys()
    if policy in (
        "dense",
        "random_ltd",
        "shared_bypass",
        "visible_bypass",
        "sparse_mlp",
        "kv_injection_both",
        "patches",
    ):  # others decide by rounded scores
        ours, theirs = (torch.cat([value_of(g).float().flatten() for g in side.values()]) for side in (gradients, expected_gradients))
        assert functional.cosine_similarity(ours, theirs, dim=0) > 0.999


@pytest.mark.parametrize("policy", ["dense", "pyramid_question", "mixture_of_depths", "merge_and_injection", "visible_bypass_question"])
def test_nothing_waits_where_layers_are_computed_again(policy):
    backbone = on_device(make_backbone(policy, activation_checkpointing=True))
    pack, factors_G = on_device(make_pack(MIXED, policy)), OnDevice(torch.tensor(FACTORS))
    with Device():
        loss_and_gradient(backbone, pack, factors_G)


def attend(q, k, sequences, **options):
    return packed_attention(q, k, k, sequences, scoring=Scoring(1.0), **options)


def sequences_of(dtype=torch.int32):
    return Sequences([1, 3], OnDevice(torch.tensor([0, 1, 4], dtype=dtype)))


HEADS = torch.randn(4, 2, 8).bfloat16()
MISTAKES = {
    "item": lambda x, host: x.sum().item(),
    "float": lambda x, host: float(x.sum()),
    "bool": lambda x, host: bool(x.any()),
    "tolist": lambda x, host: x.tolist(),
    "cpu": lambda x, host: x.cpu(),
    "to the host": lambda x, host: host.copy_(x[0].sum()),
    "nonzero": lambda x, host: x.nonzero(),
    "unique": lambda x, host: x.unique(),
    "isin": lambda x, host: torch.isin(x, x),
    "a mask as an index": lambda x, host: x[x > 0],
    "repeats without their sum": lambda x, host: x.repeat_interleave(x.argmax(1) * 0 + 1, 0),
    "equal": lambda x, host: x.equal(x),
    "devices mixed": lambda x, host: x + host,
    "devices concatenated": lambda x, host: torch.cat([x, host[None].expand(1, 4)]),
    "an index of the host": lambda x, host: x[host.long()],
    "a list as an index": lambda x, host: x[[0, 1]],
    "index_select by the host": lambda x, host: x.index_select(0, host.long()),
    "a tensor made on the host": lambda x, host: torch.ones(3),
    "arange on the host": lambda x, host: x + torch.arange(4),
    "a copy that waits": lambda x, host: host.to(META),
    "a running sum of floats": lambda x, host: x.cumsum(0),
}
MIXED_TYPES = {
    "matmul": lambda x, host: x @ x.float(),
    "index_add": lambda x, host: x.index_add(0, x.argmax(0), x.float()),
    "index_copy": lambda x, host: x.index_copy(0, x.argmax(0), x.float()),
    "attention in float32 and bfloat16": lambda x, host: attend(OnDevice(HEADS), OnDevice(HEADS.float()), sequences_of()),
    "boundaries in int64": lambda x, host: attend(OnDevice(HEADS), OnDevice(HEADS), sequences_of(torch.int64)),
    "heads that are too narrow": lambda x, host: attend(OnDevice(HEADS[..., :4]), OnDevice(HEADS[..., :4]), sequences_of()),
    "a bias that makes heads too wide": lambda x, host: attend(
        OnDevice(HEADS.repeat(1, 1, 32)), OnDevice(HEADS.repeat(1, 1, 32)), sequences_of(), bias_T=OnDevice(torch.zeros(4))
    ),
}


def plant(mistake, on):
    value, host = torch.randn(4, 4).bfloat16(), torch.zeros(4)
    return mistake(OnDevice(value) if on else value, host)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught_that_a_cpu_forgives(name):
    if name not in ("a copy that waits",):
        plant(MISTAKES[name], on=False)
    with pytest.raises(Mistake), Device():
        plant(MISTAKES[name], on=True)


@pytest.mark.parametrize("name", MIXED_TYPES)
def test_a_planted_mistake_of_types_is_caught(name):
    with pytest.raises((AssertionError, RuntimeError)), Device():
        plant(MIXED_TYPES[name], on=True)


def test_what_is_right_is_let_through():
    with Device(host_works=True) as device:
        x = OnDevice(torch.randn(4, 4).bfloat16())
        host = torch.zeros(4).to(META, non_blocking=True)
        (x + 1).index_select(0, x.argmax(0)).float() @ host
        x.repeat_interleave(x.argmax(1) * 0 + 1, 0, output_size=4).masked_fill(x > 0, 0)
        attend(OnDevice(HEADS), OnDevice(HEADS), sequences_of())
    assert device.reads == 0


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("pyramid_question", "pyramid_redundancy")])
@torch.no_grad()
def test_decoding_waits_once_per_routed_stage_and_not_at_all_along_the_dense_route(policy):
    """Per token; the prompts are read on the host's side of this test."""
    backbone, samples = make_backbone(policy), make_samples(DRAWN)
    begins = [sample.spans[-1].start for sample in samples]
    decoder = Decoder(model=backbone, samples=samples, prompt_lengths=begins, costing=costing(policy), device=torch.device("cpu"))
    expected = [decoder.start()]
    moved = Decoder(model=backbone, samples=samples, prompt_lengths=begins, costing=costing(policy), device=torch.device("cpu"))
    moved.start()
    move(moved, on_device(make_backbone(policy)))
    routed = [stage for stage in moved.pack.route.stages if not all(x is None for x in (stage.active_K, stage.asking_K, stage.mlp_K))]
    injections = sum(len(stage.injections) for stage in moved.pack.route.stages)
    for place in range(3):
        tokens_B = torch.tensor([sample.tokens[begin + place] for sample, begin in zip(samples, begins)])
        expected.append(decoder.feed(tokens_B))
        with Device(counts_reads=True) as device:
            logits = moved.feed(OnDevice(tokens_B))
        assert device.reads <= len(routed) + injections
        assert value_of(logits).isfinite().all()


def move(decoder, backbone) -> None:
    """A decoder that has read its prompts, onto the device."""
    decoder.model, decoder.device, decoder.pack = backbone, META, on_device(decoder.pack)
    for holder in (decoder, *decoder.caches.values(), *decoder.gates.values()):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, OnDevice(value))
    for counts in decoder.gates.values():
        counts.among = counts.among.map_tensors(OnDevice)


class PlainEngine:
    """The engine's interface without DeepSpeed: gradients are summed by autograd, the optimizer only asks its guard."""

    def __init__(self, module, guard):
        self.module = module
        self.guard = guard
        state = {"param_groups": [{}], "_global_grad_norm": None, "grad_partitions_flat_buffer": torch.ones(3, device=META)}
        self.optimizer = SimpleNamespace(**state)
        self.verdicts = []

    def __call__(self, pack):
        return self.module(pack)

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.optimizer._global_grad_norm = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()
        self.verdicts.append(self.guard.found_inf)


def summed(tensor, *_operation, group=None, **_more):
    """A collective of one process: the device's group takes its tensors, the host's group takes the others."""
    assert isinstance(tensor, OnDevice) == (group is None), "a tensor of the wrong place for this group"


def test_nothing_waits_in_the_trainers_own_part_of_a_step(make_config, monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce", summed)
    monkeypatch.setattr(world_module, "_host_group", "host")
    parts = Parts(make_config({"routing.understanding": {"policy": "late_drop", "after_layer": 2}})).with_mixture()
    lanes = [0, 1]
    packs = [next(parts.make_lane(lane))[0] for lane in lanes]
    backbone = parts.make_backbone()
    to_bfloat16(backbone)
    with Device(host_works=True) as device:
        trainer = Trainer.__new__(Trainer)
        world = World(0, 1, 0, META)
        guard = Guard(parts.config.faults, META)
        engine = PlainEngine(on_device(backbone), guard)
        vars(trainer).update(
            parts=parts,
            world=world,
            observers=(),
            guard=guard,
            engine=engine,
            watchdog=SimpleNamespace(enter=lambda stage: None),
            wishes=SimpleNamespace(agree=lambda step_ends: Wish.NOTHING),
            meters=Meters(world, list(parts.config.data.sources), parts.phases.bounds, backbone.recomputed_shares(parts.phases.bounds)),
            stragglers=Stragglers(world, None),
            loss_weights=torch.ones(4),
            digests=dict.fromkeys(lanes, ""),
            states={},
            loader=iter([(packs, {}), (packs, {})]),
        )
        norms = [trainer.train_step(step) for step in range(2)]
    assert device.reads == 0 and device.calls["_varlen_attn"] == 4 * len(packs) * 2
    assert all(isinstance(norm, OnDevice) and float(value_of(norm)) > 0 for norm in norms)
    assert [float(value_of(verdict)) for verdict in engine.verdicts[1::2]] == [0.0, 0.0]


def test_a_read_back_in_the_trainers_own_part_is_caught(make_config, monkeypatch):
    monkeypatch.setattr(Meters, "add_step", lambda meters, wait_s: meters.loss_sums.tolist())
    with pytest.raises(Mistake, match="a copy to the host"):
        test_nothing_waits_in_the_trainers_own_part_of_a_step(make_config, monkeypatch)


def test_the_pack_of_this_file_has_every_kind_of_sample():
    pack = build_pack(make_samples(MIXED), costing("dense"), 1, 0, step=0, seed=0)
    assert (pack.image_tokens > 0).all() and (pack.task_labels[:2] > 0).all()
