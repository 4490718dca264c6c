"""Updates against torch's own optimizers, and state only where weights are active."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_update.backward import sparse_step
from sparse_update.optimizer import OptimConfig, Optimizer, schedule
from sparse_update.subset import Active, SubsetConfig, choose
from sparse_update.transformer import ModelConfig, Transformer


def build():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=3, heads=2, context=12, vocab_size=23, attention="explicit"))
    tokens = torch.randint(0, 23, (4, 13))
    return model, tokens[:, :-1], tokens[:, 1:]


def test_schedule_rises_and_falls():
    cfg = OptimConfig(warmup_fraction=0.1, final_fraction=0.2)
    assert schedule(0.0, cfg) == 0
    assert schedule(0.05, cfg) == pytest.approx(0.5)
    assert schedule(0.1, cfg) == pytest.approx(1.0)
    assert schedule(0.55, cfg) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule(1.0, cfg) == pytest.approx(0.2)
    assert schedule(1.3, cfg) == pytest.approx(0.2)


def test_active_rows_move_as_if_they_were_a_parameter_of_their_own():
    model, x, y = build()
    active = choose(model, SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4), 1, seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    cfg = OptimConfig(grad_clip=0.0, warmup_fraction=0.0)
    optimizer = Optimizer(model, active, cfg)
    alone = {n: before[n][a:b].clone().requires_grad_() for n, (a, b) in active.rows.items()}
    groups = [
        {"params": [p for p in alone.values() if p.dim() == 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in alone.values() if p.dim() != 2], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    for _ in range(3):
        gradients = sparse_step(model, x, y, active=active).gradients
        optimizer.set_gradients({n: g.clone() for n, g in gradients.items()})
        for n, p in alone.items():
            p.grad = gradients[n]
        optimizer.step(0.0)
        peer.step()
    for name, p in model.named_parameters():
        start, stop = active.rows[name]
        assert torch.equal(p[start:stop], alone[name]), name
        outside = torch.cat((p[:start], p[stop:]))
        assert torch.equal(outside, torch.cat((before[name][:start], before[name][stop:]))), name


def test_state_exists_for_active_rows_only_and_is_freed():
    model, x, y = build()
    everything = Optimizer(model, Active.everything(model), OptimConfig())
    everything.set_gradients(sparse_step(model, x, y).gradients)
    everything.step(0.5)
    subset = SubsetConfig(kind="layers", active_fraction=0.34, train_embeddings=False)
    partial = Optimizer(model, choose(model, subset, 0, 0), OptimConfig())
    for turn in range(3):
        active = choose(model, subset, turn, 0)
        partial.activate(active)
        assert partial.state_bytes() == 0
        partial.set_gradients(sparse_step(model, x, y, active=active).gradients)
        partial.step(0.5)
        weights = sum(p.numel() for n, p in model.named_parameters() if n.startswith(f"blocks.{turn}."))
        assert 8 * weights <= partial.state_bytes() <= 8 * weights + 64 * len(active.rows)
    assert partial.state_bytes() < 0.34 * everything.state_bytes()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip_continues_bit_equal(name):
    model, x, y = build()
    cfg = OptimConfig(name=name)
    optimizer = Optimizer(model, Active.everything(model), cfg)

    def advance(m, o, steps):
        for _ in range(steps):
            o.set_gradients(sparse_step(m, x, y).gradients)
            o.step(0.3)

    advance(model, optimizer, 3)
    twin, _, _ = build()
    twin.load_state_dict(model.state_dict())
    resumed = Optimizer(twin, Active.everything(twin), cfg)
    state = {
        part: {k: {n: v.clone() for n, v in slots.items()} for k, slots in s.items()}
        for part, s in optimizer.state_dict().items()
    }
    resumed.load_state_dict(state)
    advance(model, optimizer, 3)
    advance(twin, resumed, 3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_the_matrices_of_the_blocks():
    model, _, _ = build()
    optimizer = Optimizer(model, Active.everything(model), OptimConfig(name="muon"))
    adamw, muon = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    inner = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == inner
    assert len({id(p) for g in adamw.param_groups for p in g["params"]} | inner) == len(list(model.parameters()))


@pytest.mark.parametrize("kw", [{"name": "sgd"}, {"lr": 0.0}, {"warmup_fraction": 1.0}])
def test_bad_settings_are_refused(kw):
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**kw)
