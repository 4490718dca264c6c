"""FRUGAL: Adam on a part of each matrix, the sign on the rest, against both written out."""

from __future__ import annotations

import pytest
import torch

from sparse_update.library.attach import attach
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.methods.test_by_name import made, row
from tests.sparse_update.library.models import data, gpt2, logits_of, ours, token_losses


@pytest.mark.parametrize("kind", ["blocks", "block_columns"])
@pytest.mark.parametrize("make", [lambda: gpt2().double(), lambda: row().double(), lambda: ours().double()])
def test_frugal_is_adam_on_a_part_and_the_sign_on_the_rest(make, kind):
    model, plain = made(make), made(make)
    x, y = data()
    settings = {"kind": kind, "block_rows": 4, "change_every_steps": 3}
    gate = attach(model, method="frugal", seed=5, sign_scale=0.5, weights=settings)
    groups = [{"params": gate.parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    moments, rate = {}, 1e-2
    for step in range(7):
        if step == 3:  # thrown away: leaves no trace
            gate.loss(logits_of(model, x), y.flip(0)).backward()
            optimizer.zero_grad()
        active = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
        for name in gate.turns.strips.layers:
            strips = gate.turns.strips.layers[name][0].strips
            assert sum(strip.size for strip in strips) == model.get_parameter(name).shape[strips[0].dim]
            for i, strip in enumerate(strips):
                if (name, i) in gate.turns.strips.leaves:
                    active[name].narrow(strip.dim, strip.start, strip.size).fill_(True)
            share = active[name].double().mean()
            assert 0 < share < 0.51
        half = [slice(0, 2), slice(2, 4)]  # gradients add up over two backwards
        for part in half:
            (gate.loss(logits_of(model, x[part]), y[part]) / 2).backward()
        optimizer.step()
        schedule.step()
        gate.step(optimizer)
        optimizer.zero_grad()
        plain.zero_grad()
        token_losses(plain, x, y).mean().backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                g, on = p.grad, active[name]
                on = on if name in gate.turns.strips.layers else torch.ones_like(on)
                new = (torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), on)
                first, second, count, before = moments.get(name, new)
                if not torch.equal(on, before):  # another strip begins without moments
                    first, second, count, _ = new
                first = torch.where(on, 0.9 * first + 0.1 * g, first)
                second = torch.where(on, 0.98 * second + 0.02 * g * g, second)
                count = count + on
                adam = (first / (1 - 0.9**count)) / ((second / (1 - 0.98**count)).sqrt() + 1e-8)
                p.copy_(p * (1 - rate * 0.1) - rate * torch.where(on, adam.nan_to_num(), 0.5 * g.sign()))
                moments[name] = first, second, count, on
        rate = 1e-2 * 0.1 ** ((step + 1) // 2)
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}")
        assert {id(p) for p in optimizer.state} <= {id(p) for p in gate.parameters()}  # no state for the rest


def test_steps_that_overflow_and_other_optimizers_move_nothing():
    model, (x, y) = made(row), data()
    gate = attach(model, method="frugal", weights={"block_rows": 4})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1, fused=True)
    gate.loss(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.ones(())  # as a gradient scaler leaves it for fused kernels
    optimizer.step()
    other = made(row, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(GateError, match=r"no torch\.optim\.Optimizer"):
        gate.step(Own(gate.parameters()))
    rest = [(leaf, leaf.detach().clone()) for leaf in gate.turns.strips.signs.values()]
    gate.detach()
    optimizer.found_inf = torch.zeros(())
    optimizer.step()  # which the gate no longer hears of
    assert rest
    assert all(torch.equal(leaf, was) and leaf.grad is not None for leaf, was in rest)


class Own:
    """Something with parameter groups that is no optimizer of torch."""

    def __init__(self, parameters):
        self.param_groups, self.state = [{"params": list(parameters), "lr": 0.1}], {}
