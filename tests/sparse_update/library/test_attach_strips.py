"""Strips of weights on any module: FLOPs by torch's counter, counted bytes, gradients as slices of the dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.library.attach import attach
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.models import CHOICES, B, T, V, data, gradients, logits_of, ours, same, token_losses


def flops(model, gate, x, y):
    with FlopCounterMode(display=False) as counter:
        gate.loss(logits_of(model, x), y).backward()
    model.zero_grad()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"]


def linear_flops(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits_of(model, x)
    found = counter.get_flop_counts()["Global"]
    return sum(n for op, n in found.items() if str(op) in ("aten.mm", "aten.addmm"))


def test_counted_flops_fall_with_the_rows(model):
    x, y = data()
    forward = linear_flops(model, x)
    gate = attach(model)
    dense, _ = flops(model, gate, x, y)
    gate.detach()
    for unit in ("token", "sequence"):
        gate = attach(model, {"backward": {"unit": unit, "keep_fraction": 0.25}})
        gated, _ = flops(model, gate, x, y)
        # both products of every layer shrink to a quarter of their rows, attention's stay
        assert dense - gated == 2 * forward * 3 // 4
        assert gate.report()["rows_not_found"] == []
        gate.detach()


def test_strips_save_flops_gradient_and_optimizer_bytes(model):
    x, y = data()

    def spent(gate):
        optimizer = torch.optim.AdamW(gate.parameters())
        total, _ = flops_kept(gate)
        held = {id(p.grad): p.grad.nbytes for p in [*model.parameters(), *gate.parameters()] if p.grad is not None}
        optimizer.step()
        state = [v.nbytes for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
        return total, sum(held.values()), sum(state)

    def flops_kept(gate):
        with FlopCounterMode(display=False) as counter:
            gate.loss(logits_of(model, x), y).backward()
        return counter.get_total_flops(), None

    dense = spent(gate := attach(model))
    gate.detach()
    model.zero_grad()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4}})
    strips = gate.turns.strips.leaves
    inactive = sum(gate.turns.names[n].numel() - leaf.numel() for (n, _), leaf in strips.items())
    sparse = spent(gate)
    assert len(strips) >= 4
    assert dense[0] - sparse[0] == 2 * B * T * inactive
    assert dense[1] - sparse[1] == 8 * inactive
    assert dense[2] - sparse[2] == 2 * 8 * inactive


@pytest.mark.parametrize(("kind", "policy", "strips"), CHOICES)
def test_strip_gradients_are_slices_of_the_dense_ones(model, kind, policy, strips):
    x, y = data()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    cfg = {
        "kind": kind,
        "active_fraction": 0.5,
        "block_rows": 4,
        "policy": policy,
        "strips": strips,
        "change_every_steps": 1,
    }
    gate = attach(model, {"weights": cfg})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    reached = {name: torch.zeros(gate.turns.names[name].shape, dtype=torch.bool) for name in gate.turns.strips.layers}
    for _ in range(4):
        gate.loss(logits_of(model, x), y).backward()
        for (name, number), leaf in gate.turns.strips.leaves.items():
            strip = gate.turns.strips.layers[name][0].strips[number]
            where = (slice(None),) * strip.dim + (slice(strip.start, strip.start + strip.size),)
            torch.testing.assert_close(leaf.grad, expected[name][where], rtol=1e-9, atol=1e-13)
            assert gate.turns.names[name].grad is None
            reached[name][where] = True
        for name, p in gate.turns.names.items():
            if name not in gate.turns.strips.layers:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-13)
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()
        for p in gate.turns.names.values():
            p.grad = None
    if policy == "rotate":
        assert all(mask.all() for mask in reached.values())


def test_scored_policies_follow_the_gradient_and_need_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 16, bias=False), nn.Linear(16, V, bias=False))
    with torch.no_grad():
        model[2].weight[:, 4:] *= 1e-3  # outputs 0 to 3 of the middle layer carry nearly all of the gradient
    x, y = data()
    weights = {"kind": "blocks", "active_fraction": 0.25, "block_rows": 4, "policy": "energy", "change_every_steps": 1}
    gate = attach(model, {"weights": {**weights, "explore": 0.0}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    starts = []
    for _ in range(8):
        starts.append(gate.turns.strips.layers["1.weight"][0].strips[0].start)
        gate.loss(model(x), y).backward()
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()
    assert set(starts[:4]) == {0, 4, 8, 12}  # each once, then the best
    assert starts[4:] == [0] * 4
    with pytest.raises(GateError, match="zero_grad"):
        gate.step(optimizer)


def test_strip_gradients_do_not_pile_up_where_a_loop_clears_the_model_alone():
    torch.manual_seed(0)
    model = ours().double()
    x, y = data()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "change_every_steps": 100}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    seen = []
    for _ in range(3):
        gate.loss(model(x), y).backward()
        seen.append({n: p.grad.clone() for n, p in gate.named_parameters()})
        optimizer.step()
        gate.step(optimizer)
        model.zero_grad()
    same(seen[1], seen[0])
    same(seen[2], seen[0])


def test_column_strips_keep_less_activation():
    layer = nn.Sequential(nn.Embedding(V, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, V, bias=False))
    x, _ = data()

    def saved(kind):
        cfg = {"kind": kind, "active_fraction": 0.25, "block_rows": 16}
        gate = attach(layer, {"weights": cfg})
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
        ):
            layer[1](layer[0](x))
        gate.detach()
        return sum(sizes.values())

    assert saved("blocks") - saved("block_columns") == B * T * 48 * 4


def test_frozen_layers_leave_the_optimizer_and_others_enter(model):
    x, y = data()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    cfg = {"kind": "layers", "active_fraction": 0.5, "change_every_steps": 1, "train_embeddings": False}
    gate = attach(model, {"weights": cfg})
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.0)
    seen = []
    for _ in range(2):
        gate.loss(logits_of(model, x), y).backward()
        now = gradients(model)
        seen.append(set(now))
        same(now, {n: expected[n] for n in now}, rtol=1e-9, atol=1e-13)
        assert {id(p) for p in gate.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        optimizer.step()
        optimizer.zero_grad()
        gate.step(optimizer)
        assert not optimizer.state
    assert seen[0]
    assert not seen[0] & seen[1]


def test_any_optimizer_trains_and_strips_keep_their_group():
    x, y = data()
    rates = {"AdamW": 1e-2, "SGD": 0.1, "RMSprop": 1e-3, "Adagrad": 1e-2, "NAdam": 1e-2}
    for name, rate in rates.items():
        make = getattr(torch.optim, name)
        torch.manual_seed(0)
        model = ours()
        gate = attach(
            model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2}}
        )
        optimizer = make(model.parameters(), lr=rate)
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": rate / 2})
        last = next(n for n, p in model.named_parameters() if p is optimizer.param_groups[1]["params"][0])
        with pytest.raises(GateError, match="is in no optimizer"):
            gate.step(optimizer)
        gate.adopt(optimizer)
        first = gate.loss(model(x), y).item()
        for _ in range(8):
            gate.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            gate.step(optimizer)
        there = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert len(there) == len(set(there)) == len(list(model.parameters()))
        assert optimizer.param_groups[1]["params"] == [gate.turns.strips.leaves.get((last, 0), gate.turns.names[last])]
        assert gate.loss(model(x), y).item() < first - 0.02, name
