"""Updates against torch's own optimizers, and state only where weights are active."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_update.nested import pack, unpack
from sparse_update.step.backward import sparse_step
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.optimizer import Optimizer, storage_bytes
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import Active, Part, Subset, SubsetConfig, choose


def build(tied=False):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(width=16, layers=3, heads=2, context=12, vocab_size=23, attention="explicit", tie_embeddings=tied)
    )
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
        gradients = {n: g[0] for n, g in sparse_step(model, x, y, active=active).gradients.items()}
        optimizer.set_gradients({n: (g.clone(),) for n, g in gradients.items()})
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


def step_with(model, optimizer, x, y, active, progress=0.3):
    optimizer.set_gradients(sparse_step(model, x, y, active=active).gradients)
    return optimizer.step(progress)


@pytest.mark.parametrize("kind", ["blocks", "block_columns"])
def test_several_strips_equal_adamw_on_slices_and_the_rest_stays_bit_equal(kind):
    model, x, y = build()
    cfg = OptimConfig(grad_clip=0.0, warmup_fraction=0.0)
    subset = SubsetConfig(kind=kind, active_fraction=0.5, block_rows=4, strips=2, policy="random", embedding_strips=True)
    active = choose(model, subset, 1, 0)
    assert any(len(parts) == 2 for parts in active.parts.values())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, active, cfg)
    alone = {n: [part.of(before[n]).clone().requires_grad_() for part in parts] for n, parts in active.parts.items()}
    decayed = [p for parts in alone.values() for p in parts if p.dim() == 2]
    plain = [p for parts in alone.values() for p in parts if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=False)
    for _ in range(3):
        gradients = sparse_step(model, x, y, active=active).gradients
        for n, parts in alone.items():
            for p, g in zip(parts, gradients[n], strict=True):
                p.grad = g.clone()
        optimizer.set_gradients(gradients)
        optimizer.step(0.0)
        peer.step()
    for name, p in model.named_parameters():
        expected = before[name].clone()
        for part, strip in zip(active.parts[name], alone[name], strict=True):
            part.of(expected).copy_(strip.detach())
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)  # rows are moved by the fused kernel
        frozen = torch.ones_like(p, dtype=torch.bool)
        for part in active.parts[name]:
            part.of(frozen)[:] = False
        assert torch.equal(p[frozen], before[name][frozen]), name


def test_sign_strips_follow_their_closed_form_and_have_no_state():
    model, x, y = build()
    cfg = OptimConfig(grad_clip=0.0, warmup_fraction=0.0, lr=1e-3, sign_scale=0.5, weight_decay=0.1)
    active = choose(model, SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4, inactive="sign"), 1, 0)
    optimizer = Optimizer(model, active, cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: tuple(g.clone() for g in gs) for n, gs in sparse_step(model, x, y, active=active).gradients.items()}
    step_with(model, optimizer, x, y, active, 0.0)
    signed = 0
    for name, parts in active.parts.items():
        for part, g in zip(parts, gradients[name], strict=True):
            if part.rule == "sign":
                old = part.of(before[name])
                expected = old * (1 - cfg.lr * cfg.weight_decay) - cfg.lr * cfg.sign_scale * g.sign()
                torch.testing.assert_close(part.of(dict(model.named_parameters())[name]), expected, rtol=1e-6, atol=1e-7)
                signed += g.numel()
    assert signed > 0
    moved = sum(p.numel() for p in model.parameters()) - signed
    assert 8 * moved <= optimizer.state_bytes() <= 8 * moved + 8 * len(optimizer.leaves)


@pytest.mark.parametrize("tied", [False, True])
def test_signs_of_a_byte_move_as_signs_do_and_take_a_byte(tied):
    moved, sizes = [], []
    for rule in ("sign", "sign8"):
        model, x, y = build(tied)
        cfg = OptimConfig(grad_clip=0.0, warmup_fraction=0.0, lr=1e-3)
        chosen = {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4, "embedding_strips": True}
        active = choose(model, SubsetConfig(**chosen, inactive=rule), 1, 0)
        optimizer = Optimizer(model, active, cfg)
        for _ in range(3):
            step_with(model, optimizer, x, y, active, 0.0)
        moved.append(model.state_dict())
        sizes.append(optimizer.gradient_peak_bytes)
        assert not optimizer.signs  # cleared with the step
    for name, value in moved[0].items():
        assert torch.equal(moved[1][name], value), name
    signed = active.gradient_fraction(model) - active.fraction(model)
    of_embedding = sum(p.numel() for n, p in model.named_parameters() if n == "embed.weight") * 0.75 if tied else 0
    count = sum(p.numel() for p in model.parameters())
    saved = 3 * (signed * count - of_embedding)  # a tied embedding's gradient is a sum of two and stays whole
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.02)


def test_sign_optimizer_moves_everything_by_the_rate_without_state():
    model, x, y = build()
    cfg = OptimConfig(name="sign", lr=1e-3, warmup_fraction=0.0, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    active = Active.everything(model)
    optimizer = Optimizer(model, active, cfg)
    gradients = {n: g[0].clone() for n, g in sparse_step(model, x, y, active=active).gradients.items()}
    step_with(model, optimizer, x, y, active, 0.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 1e-3 * gradients[name].sign(), rtol=1e-6, atol=1e-7)
    assert optimizer.state_bytes() == 0
    assert optimizer.peak_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_look_strips_are_formed_and_counted_but_never_move():
    model, x, y = build()
    active = Active({"blocks.0.mlp.fc1.weight": (Part(0, 0, 16), Part(0, 32, 64, "look"))}, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, active, OptimConfig())
    optimizer.set_gradients(sparse_step(model, x, y, active=active).gradients)
    assert optimizer.gradient_bytes() == 4 * 16 * (16 + 32)
    optimizer.step(0.3)
    assert optimizer.gradient_bytes() == 0
    weight = model.blocks[0].mlp.fc1.weight
    assert not torch.equal(weight[:16], before["blocks.0.mlp.fc1.weight"][:16])
    assert torch.equal(weight[16:], before["blocks.0.mlp.fc1.weight"][16:])


@pytest.mark.parametrize("name", ["adamw", "muon", "sign"])
def test_bytes_equal_the_sum_over_the_tensors(name):
    model, x, y = build()
    active = choose(model, SubsetConfig(kind="blocks", active_fraction=0.25, block_rows=4), 0, 0)
    optimizer = Optimizer(model, active, OptimConfig(name=name))
    optimizer.set_gradients(sparse_step(model, x, y, active=active).gradients)
    leaves = [*optimizer.leaves.values(), *optimizer.signed.values()]
    gradient = sum(leaf.grad.numel() * 4 for leaf in leaves)
    assert optimizer.gradient_bytes() == gradient
    optimizer.step(0.3)
    state = sum(
        v.numel() * v.element_size()
        for part in optimizer.parts
        for s in part.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    )
    assert optimizer.state_bytes() == state
    assert optimizer.gradient_peak_bytes == gradient
    assert optimizer.peak_bytes == gradient + state


def test_a_view_counts_its_whole_storage_once():
    whole = torch.zeros(100)
    assert storage_bytes([whole[:10], whole[50:], None]) == 400


def test_strips_that_stay_keep_their_moments_and_others_are_freed():
    model, x, y = build()
    subset = SubsetConfig(kind="layers", active_layers=1)
    first, second = choose(model, subset, 0, 0), choose(model, subset, 1, 0)
    optimizer = Optimizer(model, first, OptimConfig())
    step_with(model, optimizer, x, y, first)
    moment = optimizer.parts[0].state[model.head.weight]["exp_avg"].clone()
    bytes_first = optimizer.state_bytes()
    optimizer.activate(second)
    assert torch.equal(optimizer.parts[0].state[model.head.weight]["exp_avg"], moment)
    assert model.blocks[0].mlp.fc1.weight not in optimizer.parts[0].state
    assert optimizer.state_bytes() < bytes_first
    step_with(model, optimizer, x, y, second)
    assert optimizer.state_bytes() == bytes_first


def test_kept_moments_wait_for_their_strip_and_are_counted():
    model, x, y = build()
    subset = SubsetConfig(kind="layers", active_layers=1)
    first, second = choose(model, subset, 0, 0), choose(model, subset, 1, 0)
    optimizer = Optimizer(model, first, OptimConfig(frozen_moments="keep"))
    step_with(model, optimizer, x, y, first)
    weight = model.blocks[0].mlp.fc1.weight
    moment = optimizer.parts[0].state[weight]["exp_avg"].clone()
    held = optimizer.state_bytes()
    optimizer.activate(second)
    assert optimizer.state_bytes() == held
    frozen = weight.detach().clone()
    step_with(model, optimizer, x, y, second)
    assert torch.equal(weight, frozen)
    optimizer.activate(first)
    assert torch.equal(optimizer.parts[0].state[weight]["exp_avg"], moment)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model, x, y = build()
    active = Active.everything(model)
    optimizer = Optimizer(model, active, OptimConfig())
    step_with(model, optimizer, x, y, active)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moment = optimizer.parts[0].state[model.head.weight]["exp_avg"].clone()
    gradients = sparse_step(model, x, y).gradients
    gradients["norm.weight"][0][0] = float("nan")
    optimizer.set_gradients(gradients)
    assert math.isnan(optimizer.step(0.3))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(optimizer.parts[0].state[model.head.weight]["exp_avg"], moment)
    assert optimizer.gradient_bytes() == 0


def test_a_parameter_without_a_gradient_stays():
    model, x, y = build()
    active = Active.everything(model)
    optimizer = Optimizer(model, active, OptimConfig())
    gradients = dict(sparse_step(model, x, y).gradients)
    del gradients["blocks.1.mlp.fc1.weight"]
    before = model.blocks[1].mlp.fc1.weight.detach().clone()
    optimizer.set_gradients(gradients)
    optimizer.step(0.3)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before)


VARIANTS = {
    "lisa": ({"kind": "layers", "policy": "random", "active_layers": 1}, {}),
    "badam": ({"kind": "layers", "active_layers": 1, "train_embeddings": False}, {}),
    "frugal": ({"kind": "blocks", "policy": "random", "active_fraction": 0.25, "block_rows": 4, "inactive": "sign"}, {}),
    "frugal8": ({"kind": "blocks", "policy": "energy", "active_fraction": 0.25, "block_rows": 4, "inactive": "sign8"}, {}),
    "blocks kept": ({"kind": "blocks", "active_fraction": 0.25, "block_rows": 4}, {"frozen_moments": "keep"}),
    "columns muon": ({"kind": "block_columns", "active_fraction": 0.5, "block_rows": 4}, {"name": "muon"}),
    "surprise looks": (
        {"kind": "blocks", "policy": "surprise", "active_fraction": 0.25, "block_rows": 4, "strips": 2,
         "look_every_turns": 1, "look_steps": 2, "embedding_strips": True},
        {},
    ),
    "fisher": ({"kind": "blocks", "policy": "fisher", "active_fraction": 0.25, "block_rows": 4}, {}),
    "energy layers": ({"kind": "layers", "policy": "energy", "active_layers": 1}, {}),
    "sign": ({"kind": "blocks", "active_fraction": 0.5, "block_rows": 4}, {"name": "sign"}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resumes_bit_equal(variant):
    """As a run does it: turns, looks and moments, cut in the middle of a turn."""
    chosen, rule = VARIANTS[variant]
    cfg = SubsetConfig(**chosen, change_every_steps=4)

    def go(model, subset, optimizer, first, steps):
        generator = torch.Generator().manual_seed(first)
        for step in range(first, first + steps):
            if subset.due(step, step / 100):
                optimizer.activate(subset.advance())
            tokens = torch.randint(0, 23, (4, 13), generator=generator.manual_seed(step))
            found = sparse_step(model, tokens[:, :-1], tokens[:, 1:], active=subset.active)
            optimizer.set_gradients(found.gradients)
            subset.observe(found.gradients, float(found.loss_BT.mean()))
            optimizer.step(step / 100)

    model, _, _ = build()
    subset = Subset(model, cfg, 5)
    optimizer = Optimizer(model, subset.active, OptimConfig(**rule))
    go(model, subset, optimizer, 0, 10)
    tensors, outline = pack({"subset": subset.state_dict(), "optimizer": optimizer.state_dict()})
    state = unpack(outline, {k: v.clone() for k, v in tensors.items()})
    twin, _, _ = build()
    twin.load_state_dict(model.state_dict())
    other = Subset(twin, cfg, 5)
    other.load_state_dict(state["subset"])
    resumed = Optimizer(twin, other.active, OptimConfig(**rule))
    resumed.load_state_dict(state["optimizer"])
    assert resumed.state_bytes() == optimizer.state_bytes()
    go(model, subset, optimizer, 10, 12)
    go(twin, other, resumed, 10, 12)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "kw",
    [{"frozen_moments": "lost"}, {"sign_scale": 0.0}, {"galore_rank": 0}, {"name": "galore", "frozen_moments": "keep"}],
)
def test_bad_rules_are_refused(kw):
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**kw)
