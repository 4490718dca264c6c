"""Axes of a residual stream: the function stays, the values get few."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from neuro.training.basis import Stream, principal_axes, sparse_axes, turn_heads
from sparse_update.transformer import ModelConfig, Transformer

WIDTH = 16


class Net(nn.Module):
    """Two steps on a residual stream with RMSNorm, biases in what writes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 20)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.tanh(up(norm(x))))
        return self.head(self.norms[2](x))

    def stream(self) -> Stream:
        readers = [(self.norms[i], [up]) for i, up in enumerate(self.up)]
        return Stream([self.embed], list(self.down), [*readers, (self.norms[2], [self.head])])


def random_axes(seed: int, width: int = WIDTH) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())[0].float()


def test_turning_keeps_the_function() -> None:
    torch.manual_seed(0)
    net, tokens = Net(), torch.randint(0, 20, (4, 9))
    before, gains = net(tokens), net.norms[0].weight.clone()
    embedded = net.embed.weight.clone()
    net.stream().turn(random_axes(1))
    torch.testing.assert_close(net(tokens), before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(gains, torch.ones(WIDTH))
    assert all(torch.equal(norm.weight, torch.ones(WIDTH)) for norm in net.norms)
    torch.testing.assert_close(net.embed.weight, embedded @ random_axes(1))


def test_turning_heads_keeps_the_function() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=1, heads=2, context=16, vocab_size=11))
    nn.init.normal_(model.blocks[0].attn.o.weight)
    tokens = torch.randint(0, 11, (3, 16))
    before = model(tokens)
    attention = model.blocks[0].attn
    turn_heads(attention.v, attention.o, [random_axes(2, 8), random_axes(3, 8)])
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-5)


def test_axes_of_a_hidden_sparse_code_are_found() -> None:
    """Rows that are sparse in axes of their own, turned away: mean |x R| comes back to what it is in those axes."""
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(4000, 8, generator=generator) * (torch.rand(4000, 8, generator=generator) < 0.15)
    code[:, 0] *= 3
    x = code @ random_axes(4, 8).T
    found = sparse_axes(x, steps=300)
    torch.testing.assert_close(found.T @ found, torch.eye(8), rtol=0, atol=1e-5)
    best = float(code.abs().mean())
    assert float((x @ found).abs().mean()) < 1.05 * best
    assert float((x @ principal_axes(x)).abs().mean()) > 1.2 * best
    assert torch.equal(found, sparse_axes(x, steps=300))


def test_principal_axes_have_falling_energy() -> None:
    x = torch.randn(500, 6) * torch.tensor([1.0, 4, 2, 0.5, 3, 0.1])
    energy = (x @ principal_axes(x)).square().mean(0)
    torch.testing.assert_close(energy, torch.linalg.eigvalsh(x.T @ x / 500).flip(0), rtol=1e-3, atol=1e-4)


def tied() -> Stream:
    net = Net()
    net.head.weight = net.embed.weight
    return net.stream()


def with_mean() -> Stream:
    net = Net()
    net.norms[1] = nn.LayerNorm(WIDTH)
    return net.stream()


@pytest.mark.parametrize(
    ("stream", "axes", "message"),
    [
        (tied, random_axes(0), "share one weight"),
        (with_mean, random_axes(0), "LayerNorm subtracts a mean"),
        (lambda: Net().stream(), 2 * random_axes(0), "not orthogonal"),
    ],
)
def test_what_cannot_be_turned_is_refused_untouched(stream: object, axes: Tensor, message: str) -> None:
    made: Stream = stream()  # type: ignore[operator]
    before = copy.deepcopy([m.weight for m in made.writers])
    with pytest.raises(ValueError, match=message):
        made.turn(axes)
    assert all(torch.equal(a, m.weight) for a, m in zip(before, made.writers, strict=True))


def test_bad_samples_and_heads() -> None:
    with pytest.raises(ValueError, match="at least as many as channels"):
        sparse_axes(torch.randn(3, 5))
    with pytest.raises(ValueError, match="do not fit"):
        turn_heads(nn.Linear(8, 8), nn.Linear(8, 8), [torch.eye(3)])
