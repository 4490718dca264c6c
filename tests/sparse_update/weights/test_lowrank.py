"""The low-rank controls against their own definitions; skipped where the extra `peers` is not installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.clock.cost import Step
from sparse_update.clock.timing import Setting, step_probe
from sparse_update.gates.config import GateConfig
from sparse_update.loop.assembly import check_adapter
from sparse_update.nested import pack, unpack
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.lowrank import MATRICES, PeersError, adapt, add_lora, apart, decompose, merged, rank_of, restore
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, Subset, SubsetConfig

needs_galore = pytest.mark.skipif(
    not (importlib.util.find_spec("galore_torch") and importlib.util.find_spec("transformers")), reason="needs galore-torch"
)
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")


def build():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=2, heads=2, context=12, vocab_size=23, attention="explicit"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = torch.randint(0, 23, (4, 13))
    return model, tokens[:, :-1], tokens[:, 1:]


def advance(model, optimizer, x, y, steps):
    for _ in range(steps):
        token_loss(model(x), y).mean().backward()
        optimizer.step(0.3)


@needs_galore
def test_galore_moves_matrices_within_its_rank_and_its_moments_are_small():
    model, x, y = build()
    before = model.blocks[0].mlp.fc1.weight.detach().clone()
    cfg = OptimConfig(name="galore", galore_rank=2, weight_decay=0.0)
    optimizer = Optimizer(model, Active.everything(model), cfg)
    advance(model, optimizer, x, y, 3)
    moved = model.blocks[0].mlp.fc1.weight.detach() - before
    values = torch.linalg.svdvals(moved)
    assert values[1] > 0
    assert values[2] < 1e-5 * values[0]
    full = Optimizer(model, Active.everything(model), OptimConfig())
    advance(model, full, x, y, 1)
    assert optimizer.state_bytes() < 0.55 * full.state_bytes()
    state = next(iter(optimizer.parts[1].state.values()))
    tensors = (state["exp_avg"], state["exp_avg_sq"], state["projector"].ortho_matrix)
    assert all(2 in t.shape for t in tensors)


@needs_galore
def test_galore_first_step_is_the_papers_rule():
    model, x, y = build()
    cfg = OptimConfig(name="galore", galore_rank=2, weight_decay=0.0, warmup_fraction=0.0, grad_clip=0.0)
    optimizer = Optimizer(model, Active.everything(model), cfg)
    weight = model.blocks[1].mlp.fc1.weight  # (64, 16): tall, projected on the right
    before = weight.detach().clone()
    token_loss(model(x), y).mean().backward()
    g = weight.grad.clone()
    optimizer.step(0.0)
    basis = torch.linalg.svd(g, full_matrices=False).Vh[:2]
    low = g @ basis.T
    first = low / (low.abs() + 1e-6 / (1 - cfg.beta2) ** 0.5)  # Adam's first step with the library's epsilon
    expected = before - cfg.lr * cfg.galore_scale * first @ basis
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)


@needs_galore
def test_galore_resumes_bit_equal():
    model, x, y = build()
    cfg = OptimConfig(name="galore", galore_rank=2, galore_every_steps=4)
    optimizer = Optimizer(model, Active.everything(model), cfg)
    advance(model, optimizer, x, y, 3)
    twin, _, _ = build()
    twin.load_state_dict(model.state_dict())
    resumed = Optimizer(twin, Active.everything(twin), cfg)
    tensors, outline = pack(optimizer.state_dict())
    resumed.load_state_dict(unpack(outline, {k: v.clone() for k, v in tensors.items()}))
    assert resumed.state_bytes() == optimizer.state_bytes()
    advance(model, optimizer, x, y, 4)
    advance(twin, resumed, x, y, 4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@needs_peft
def test_lora_starts_as_the_model_and_trains_its_factors_only():
    model, x, y = build()
    with torch.no_grad():
        expected = model(x)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted = add_lora(model, rank=2)
    torch.testing.assert_close(adapted(x), expected)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    sizes = [s for n, s in frozen.items() if n.split(".")[-2] in MATRICES]
    assert sum(p.numel() for p in trained) == sum(2 * sum(s.shape) for s in sizes)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = token_loss(adapted(x), y).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, p in adapted.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name.replace("base_layer.", "")]), name


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in [n for n in sys.modules if n.startswith("galore_torch")]:
        monkeypatch.delitem(sys.modules, name)
    model, _, _ = build()
    with pytest.raises(PeersError, match="galore-torch"):
        Optimizer(model, Active.everything(model), OptimConfig(name="galore"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PeersError, match="peers"):
        add_lora(model, 2)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank"):
        add_lora(build()[0], 0)


LORA = SubsetConfig(name="lora", kind="lora", rank=2, rank_scale=3.0)


def adapted(seed=0):
    """A model whose factors have both moved away from where they start, and its LoRA optimizer."""
    model, x, y = build()
    adapt(model, LORA, seed)
    optimizer = Optimizer(model, Subset(model, LORA, seed).active, OptimConfig(lr=0.02))
    advance(model, optimizer, x, y, 5)
    return model, optimizer, x, y


@needs_peft
def test_merged_weights_are_the_adapted_model_and_parts_bring_it_back_to_the_bit():
    model, _, x, _ = adapted()
    plain, _, _ = build()
    plain.load_state_dict(merged(model))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
        unmoved, _, _ = build()
        assert (plain(x) - unmoved(x)).abs().max() > 1e-2
    other, _, _ = build()
    adapt(other, LORA, seed=9)
    restore(other, merged(model), apart(model))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    wider, _, _ = build()
    add_lora(wider, 3)
    with pytest.raises(ValueError, match=r"subset\.rank"):
        restore(wider, merged(model), apart(model))


@needs_peft
def test_only_factors_have_gradients_and_moments_which_are_small():
    model, optimizer, x, y = adapted()
    factors = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert rank_of(optimizer.active) == 2
    assert rank_of(Active.everything(build()[0])) == rank_of(None) == 0
    token_loss(model(x), y).mean().backward()
    assert optimizer.gradient_bytes() == 4 * factors
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)
    tensors = 2 * 2 * len(MATRICES)  # a step count each, 4 bytes
    assert optimizer.state_bytes() == 8 * factors + 4 * tensors


@needs_peft
def test_factors_are_drawn_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (apart(adapted(seed)[0]) for seed in (0, 0, 1))
    torch.set_rng_state(before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@needs_peft
def test_flops_of_lora_are_what_torch_counts():
    model, optimizer, x, y = adapted()
    with FlopCounterMode(display=False) as forward:
        loss = token_loss(model(x), y).mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = plan_flops(model.cfg, len(x), PLAIN, optimizer.active)
    assert found.forward == forward.get_total_flops()
    assert found.backward_dx + found.backward_dw == backward.get_total_flops()


@pytest.mark.parametrize(
    "gate", [{"unit": "token", "signal": "token_loss", "keep_fraction": 0.5}, {"unit": "dw_rows", "dw_fraction": 0.5}]
)
def test_gates_that_look_into_the_model_are_refused_beside_lora(gate):
    with pytest.raises(ValueError, match="LoRA runs by autograd"):
        check_adapter(GateConfig(**gate))


def test_lora_without_factors_and_bad_ranks_are_refused():
    with pytest.raises(ValueError, match="add_lora"):
        Subset(build()[0], LORA, 0)
    for bad in ({"rank": 0}, {"rank_scale": 0.0}):
        with pytest.raises(ValueError, match=r"subset\.rank"):
            SubsetConfig(kind="lora", **bad)


@needs_galore
def test_galores_decompositions_are_on_the_clock(monkeypatch):
    model, x, y = build()
    calls = []
    monkeypatch.setattr("sparse_update.clock.timing.decompose", lambda part: calls.append(decompose(part)))
    cfg = OptimConfig(name="galore", galore_rank=2)
    setting = Setting(model.cfg, cfg, torch.device("cpu"), "explicit", "fp32")
    seconds = step_probe(setting, Step(PLAIN, None, 4, 12, "galore:2/200"), "mine")()
    assert seconds["mine"] > 0
    assert len(calls) == 2  # AdamW's part has nothing to decompose, the matrices' has
    optimizer = Optimizer(model, Active.everything(model), cfg)
    advance(model, optimizer, x, y, 1)
    before = [state["projector"].ortho_matrix.clone() for state in optimizer.parts[1].state.values()]
    decompose(optimizer.parts[1])
    after = [state["projector"].ortho_matrix for state in optimizer.parts[1].state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
