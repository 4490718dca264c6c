"""The sparse step against torch's autograd in float64: all rows, kept rows, active rows, layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_update.step.backward import Stepper, sparse_step
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.subset import Active, Part, SubsetConfig, choose


def build(**kw):
    torch.manual_seed(1)
    model = Transformer(
        ModelConfig(
            **{"width": 16, "layers": 3, "heads": 2, "context": 12, "vocab_size": 23, "attention": "explicit", **kw}
        )
    ).double()
    k = model.cfg.width // model.cfg.heads
    angle = torch.outer(torch.arange(12, dtype=torch.float64), 10000.0 ** (-torch.arange(0, k, 2, dtype=torch.float64) / k))
    with torch.no_grad():
        model.cos.copy_(angle.cos())
        model.sin.copy_(angle.sin())
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def data(batch=4):
    tokens = torch.randint(0, 23, (batch, 13), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def autograd(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("tie", [False, True])
def test_all_rows_equal_autograd_on_the_module(attention, activation, tie):
    model = build(attention=attention, activation=activation, tie_embeddings=tie)
    x, y = data()
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    expected = autograd(model, loss)
    step = sparse_step(model, x, y)
    assert step.gradients.keys() == expected.keys()
    torch.testing.assert_close(step.loss_BT.mean(), loss.detach())
    for name, gradient in expected.items():
        torch.testing.assert_close(step.gradients[name][0], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("tie", [False, True])
def test_kept_rows_equal_autograd_with_the_others_detached(reference, attention, tie):
    model = build(attention=attention, tie_embeddings=tie)
    x, y = data()
    rows = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:5].sort().values for i in range(4)])
    keep = torch.zeros(4, 12, dtype=torch.bool).scatter_(1, rows, True)
    loss = F.cross_entropy(reference(model, x, keep)[keep], y[keep])
    expected = autograd(model, loss)
    step = sparse_step(model, x, y, choose_rows=lambda _: rows)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(step.gradients[name][0], gradient, rtol=1e-9, atol=1e-12)


def test_keeping_every_row_by_index_changes_nothing():
    model = build()
    x, y = data()
    every = torch.arange(12).expand(4, 12)
    plain, indexed = sparse_step(model, x, y), sparse_step(model, x, y, choose_rows=lambda _: every)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(indexed.gradients[name][0], gradient[0], rtol=1e-10, atol=1e-13)


def test_rows_are_chosen_by_the_losses_of_this_forward():
    model = build()
    x, y = data()
    seen = []
    sparse_step(model, x, y, choose_rows=lambda loss: seen.append(loss) or loss.topk(3, dim=1).indices.sort().values)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(4, 12)
    torch.testing.assert_close(seen[0], expected.detach())


@pytest.mark.parametrize("policy", ["rotate", "random"])
@pytest.mark.parametrize("turn", [0, 1, 2, 5])
def test_block_gradients_are_rows_of_the_dense_gradient(policy, turn):
    model = build()
    x, y = data()
    dense = sparse_step(model, x, y).gradients
    active = choose(model, SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4, policy=policy), turn, seed=3)
    sparse = sparse_step(model, x, y, active=active).gradients
    assert sparse.keys() == active.parts.keys()
    for name, parts in active.parts.items():
        for part, gradient in zip(parts, sparse[name], strict=True):
            torch.testing.assert_close(gradient, part.of(dense[name][0]), rtol=1e-10, atol=1e-13)
    assert sparse["blocks.1.mlp.fc1.weight"][0].shape == (32, 16)  # half of 64 rows: really smaller, not masked


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("spans", [((0, 3),), ((2, 5), (9, 16)), ((0, 4), (4, 9), (9, 16))])
def test_strips_of_rows_and_columns_are_strips_of_the_dense_gradient(dim, spans):
    model = build(tie_embeddings=True)
    x, y = data()
    dense = sparse_step(model, x, y).gradients
    rules = ("optimizer", "sign", "look")
    parts = tuple(Part(dim, start, stop, rules[i]) for i, (start, stop) in enumerate(spans))
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    sparse = sparse_step(model, x, y, active=Active(dict.fromkeys(names, parts), 0)).gradients
    assert sparse.keys() == set(names)
    for name in names:
        for part, gradient in zip(parts, sparse[name], strict=True):
            torch.testing.assert_close(gradient, part.of(dense[name][0]), rtol=1e-10, atol=1e-13)


def test_frozen_layers_get_no_gradient_and_stop_the_backward():
    model = build()
    x, y = data()
    dense = sparse_step(model, x, y).gradients
    cfg = SubsetConfig(kind="layers", active_fraction=1 / 3, train_embeddings=False)
    for turn in range(3):
        active = choose(model, cfg, turn, seed=0)
        assert active.lowest_block == turn
        sparse = sparse_step(model, x, y, active=active).gradients
        assert sparse.keys() == {name for name in dense if name.startswith(f"blocks.{turn}.")}
        for name, gradient in sparse.items():
            torch.testing.assert_close(gradient[0], dense[name][0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_watched_factors_are_those_of_autograd_and_give_each_windows_gradient(attention):
    model = build(attention=attention)
    x, y = data()
    layers = {"head", "blocks.2.attn.q", "blocks.2.attn.v", "blocks.1.attn.o", "blocks.0.mlp.fc1", "blocks.2.mlp.fc2"}
    step = Stepper(model).step(x, y, watched=frozenset(f"{name}.weight" for name in layers))
    assert set(step.factors) == {f"{name}.weight" for name in layers}
    for i in range(len(x)):
        alone = autograd(model, F.cross_entropy(model(x[i : i + 1]).flatten(0, 1), y[i]) / len(x))
        for name, (inputs, outputs) in step.factors.items():
            torch.testing.assert_close(outputs[i].T @ inputs[i], alone[name], rtol=1e-8, atol=1e-12)
    assert not Stepper(model).step(x, y).factors
