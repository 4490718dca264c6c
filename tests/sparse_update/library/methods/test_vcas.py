"""VCAS on any stack of blocks, against autograd on the plain model with the same draws, and its rates by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.library.attach import attach
from sparse_update.library.methods import vcas as module
from sparse_update.library.tracking.rows import GateError
from sparse_update.step.draw import inclusion
from tests.sparse_update.library.models import B, T, V, data, gpt2, gradients, logits_of, ours, same, token_losses


def tower(width=8):
    return nn.Sequential(
        nn.Embedding(V, width), *(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)), nn.Linear(width, V)
    )


MODELS = {
    "tower": (tower, lambda m: list(m[1:4])),
    "ours": (ours, lambda m: list(m.blocks)),
    "gpt2": (gpt2, lambda m: list(m.transformer.h)),
}


def made(name):
    torch.manual_seed(3)
    make, blocks = MODELS[name]
    model = make().double()
    return model, blocks(model)


def gate_at(model, rho, nu, **settings):
    gate = attach(model, method="vcas", **settings)
    gate.row_loss.vcas.rates.rho, gate.row_loss.vcas.rates.nu = rho, nu
    return gate


@pytest.mark.parametrize("name", MODELS)
def test_sampled_sequences_equal_autograd_with_the_others_scaled_away(name, monkeypatch):
    model, blocks = made(name)
    x, y = data()
    drawn = []
    monkeypatch.setattr(module, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    rho = [0.25, 0.5, 0.75][-len(blocks) :]
    plain = copy.deepcopy(model)
    gate = gate_at(model, rho, 1.0)
    gate.loss(logits_of(model, x), y).backward()
    assert [len(index) for index, _ in drawn] == [round(share * B) for share in reversed(rho)]
    kept, at = torch.arange(B), iter(drawn)

    def scaled(g):
        nonlocal kept
        index, inverse = next(at)
        kept = kept[index]
        out = torch.zeros_like(g)
        out[kept] = g[kept] * inverse[:, None, None]
        return out

    def hook(m, args, out):
        (out[0] if isinstance(out, tuple) else out).register_hook(scaled)

    for block in MODELS[name][1](plain):
        block.register_forward_hook(hook)
    token_losses(plain, x, y).mean().backward()
    same(gradients(model), gradients(plain), rtol=1e-9, atol=1e-14)
    # an ordinary backward of the same model is whole
    model.zero_grad()
    token_losses(model, x, y).mean().backward()
    whole = gradients(model)
    model.zero_grad()
    gate.detach()
    token_losses(model, x, y).mean().backward()
    same(gradients(model), whole)


draw = module.draw


def test_both_kinds_of_sampling_are_unbiased(monkeypatch):
    model, _ = made("tower")
    x, y = data()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    start = 0.0

    def systematic(mass, count, generator):
        p = inclusion(mass, count)
        edge = p.cumsum(0) * (count / p.sum())
        index = torch.searchsorted(edge, start + torch.arange(count, dtype=torch.float64), right=True).clamp(max=len(p) - 1)
        return index, 1 / p[index]

    monkeypatch.setattr(module, "draw", systematic)
    for rho, nu in (([0.5, 1.0, 1.0], 1.0), ([1.0, 1.0, 1.0], 0.25)):
        total, points = {}, 80
        gate = gate_at(model, rho, nu)
        for point in range(points):
            start = (point + 0.5) / points
            model.zero_grad()
            gate.loss(model(x), y).backward()
            for key, g in gradients(model).items():
                total[key] = total.get(key, 0) + g / points
        gate.detach()
        for key, g in expected.items():
            assert (total[key] - g).norm() <= 0.06 * g.norm(), key
        spread = (gradients(model)["1.0.weight"] - expected["1.0.weight"]).norm() / expected["1.0.weight"].norm()
        assert spread > 0.05  # a single one is something else


def by_hand(norms, s):
    ordered = sorted(norms.tolist(), reverse=True)
    held = 0.0
    for count, norm in enumerate(ordered, 1):
        held += norm
        if held >= s * sum(ordered) - 1e-9:
            return count / len(ordered)
    return 1.0


def test_the_first_test_sets_rates_by_the_paper():
    model, blocks = made("ours")
    x, y = data()
    gate = attach(model, method="vcas", gradient={"every": 1, "alpha": 0.3, "beta": 0.5})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    gate.loss(model(x), y).backward()
    assert gate.report()["rates"] == {"sequences": [1.0, 1.0], "rows": 1.0}
    optimizer.step()
    gate.step(optimizer)
    plain = copy.deepcopy(model)
    gate.loss(model(x), y)
    outputs = []
    hooks = [block.register_forward_hook(lambda m, a, out: outputs.append(out)) for block in plain.blocks]
    found = torch.autograd.grad(token_losses(plain, x, y).mean(), outputs)
    needed = [by_hand(g.flatten(1).norm(dim=1), 0.7) for g in found]
    rates = gate.row_loss.vcas.rates
    assert (rates.s, rates.nu) == (pytest.approx(0.7), 0.5)
    assert rates.rho == pytest.approx([needed[0], max(needed)])
    assert min(needed) < 1
    assert len(hooks) == len(blocks)


def test_a_test_compares_what_sampling_adds_with_the_variance_of_the_batch():
    """Parts that are alike have no variance, so any that is added is too much; unlike parts allow some."""
    for alike in (True, False):
        model, _ = made("tower")
        x, y = data()
        if alike:
            x, y = (part[:2].repeat_interleave(2, 0) for part in (x, y))
        gate = gate_at(model, [0.5, 0.5, 0.5], 0.5, gradient={"every": 1, "tau": 0.3 if alike else 1e6, "alpha": 0.1})
        rates, optimizer = gate.row_loss.vcas.rates, torch.optim.SGD(gate.parameters(), lr=0.0)
        rates.s = 0.5
        gate.loss(model(x), y).backward()
        gate.step(optimizer)
        gate.loss(model(x), y)
        assert rates.s == pytest.approx(0.6 if alike else 0.4)
        assert rates.nu == pytest.approx(0.5 / 0.95 if alike else 0.5 * 0.95)


def test_a_test_leaves_gradients_alone_and_repeats():
    model, _ = made("gpt2")
    x, y = data()
    gate = gate_at(model, [1.0, 1.0], 1.0, gradient={"every": 1})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.0)
    gate.step(optimizer)
    loss = gate.loss(logits_of(model, x), y)
    assert all(p.grad is None for p in model.parameters())
    state = gate.state_dict()
    torch.testing.assert_close(loss, token_losses(model, x, y).mean())
    gate.loss(logits_of(model, x), y)  # accumulated: one test for each step
    assert gate.state_dict()["rows"]["vcas"]["s"] == state["rows"]["vcas"]["s"] == pytest.approx(0.99)


def test_flops_fall_with_the_rates():
    def flops(rho, nu):
        model, _ = made("tower")
        x, y = data()
        gate = gate_at(model, rho, nu)
        gate.loss(model(x), y).backward()  # the first forward may be watched
        with FlopCounterMode(display=False) as counter:
            gate.loss(model(x), y).backward()
        gate.detach()
        return counter.get_total_flops()

    one = 2 * B * T * 8 * 8  # a product of one block
    dense = flops([1.0, 1.0, 1.0], 1.0)
    assert dense - flops([0.25, 0.5, 0.5], 1.0) == one * (2 * 0.75 + 4 * 0.5)
    assert dense - flops([1.0, 1.0, 1.0], 0.25) == 3 * one * 0.75


def test_what_it_cannot_serve_is_said():
    with pytest.raises(ValueError, match=r"gradient\.tau = 0"):
        attach(tower(), method="vcas", gradient={"tau": 0.0})
    with pytest.raises(ValueError, match="leave one of them at none"):
        attach(tower(), method="vcas", backward={"unit": "token", "keep_fraction": 0.5})
    with pytest.raises(GateError, match="ModuleList"):
        attach(nn.Sequential(nn.Linear(4, 4)), method="vcas")
    model = tower()
    x, y = data()
    gate = attach(model, method="vcas", gradient={"every": 1})
    gate.step(torch.optim.SGD(gate.parameters(), lr=0.0))
    with pytest.raises(GateError, match="2 parts of a batch, and this one has 1"):
        gate.loss(model(x[:1]), y[:1])
    with pytest.raises(GateError, match="two gated losses"):
        (gate.loss(model(x), y) + gate.loss(model(x), y)).backward()
    with pytest.raises(GateError, match="gradient of a gradient"):
        torch.autograd.grad(gate.loss(model(x), y), gate.parameters(), create_graph=True)
    other = model(x).square().mean()
    model.zero_grad()
    gate.loss(model(x), y, others=other).backward()  # at full rates the sum of both
    found = gradients(model)
    model.zero_grad()
    (token_losses(model, x, y).mean() + model(x).square().mean()).backward()
    same(found, gradients(model), rtol=1e-4, atol=1e-6)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(x), model(x))
    gate.detach()
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="of 3 blocks, this one has 2"):
        attach(nn.Sequential(*tower()[:3], tower()[4]), method="vcas").load_state_dict(gate_state())


def gate_state():
    return attach(tower(), method="vcas").state_dict()
