"""Output channels without weights (a padding token's row of the head, a pruned neuron) and whole layers of zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuro

ROUTES = {
    "graded": neuro.GradedConfig(),
    "grouped": neuro.GradedConfig(channel_groups=4),
    "tensor": neuro.GradedConfig(scales="tensor"),
    "sigma_delta": neuro.SigmaDeltaConfig(),
    "rate": neuro.RateConfig(64),
}


def errors(module: nn.Module, x: torch.Tensor, name: str) -> list[torch.Tensor]:
    """|deployed - float| (rows, outputs) as a share of the largest float output, simulated and quantised."""
    route = name if name in ("sigma_delta", "rate") else "graded"
    plan = neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x, route=route), ROUTES[name])
    wanted = module(x).detach()
    size = max(float(wanted.abs().max()), 1e-30)
    return [(neuro.deploy(module, plan, backend)(x) - wanted).abs() / size for backend in ("fixed_point", "quantised")]


@pytest.mark.parametrize("place", ["alone", "first", "last"])
@pytest.mark.parametrize("bias", [0.0, 1e-3, 1.0, 50.0])
@pytest.mark.parametrize("name", ROUTES)
def test_a_channel_of_zeros_is_as_exact_as_the_others(name: str, bias: float, place: str) -> None:
    layer, x = nn.Linear(32, 16, bias=bias > 0), torch.randn(40, 32)
    with torch.no_grad():
        layer.weight[3] = 0
        if bias:
            layer.bias[3] = bias
    other = nn.Linear(16, 8) if place == "first" else nn.Linear(32, 32)
    parts = {"alone": [layer], "first": [layer, nn.ReLU(), other], "last": [other, nn.ReLU(), layer]}[place]
    for error in errors(nn.Sequential(*parts), x, name):
        assert float(error.max()) < (0.1 if name == "rate" else 0.03)
        if place != "first" and name != "rate":
            assert float(error[:, 3].max()) < 0.01  # nothing but its bias is to be rounded


@pytest.mark.parametrize("bias", [None, 0.0, 1e-4, 300.0])
@pytest.mark.parametrize("name", ROUTES)
def test_a_layer_of_zeros_gives_its_bias(name: str, bias: float | None) -> None:
    layer, x = nn.Linear(32, 16, bias=bias is not None), torch.randn(40, 32)
    with torch.no_grad():
        layer.weight.zero_()
        if bias is not None:
            layer.bias.copy_(torch.linspace(-bias, bias, 16))
    for error in errors(layer, x, name):
        assert float(error.max()) < 0.01


def test_the_head_of_a_model_with_a_padding_token() -> None:
    """Where the padding token's scale was 1 and not its neighbours', every logit lost most of its bits."""
    embedding, head = nn.Embedding(40, 32, padding_idx=1), nn.Linear(32, 40, bias=False)
    nn.init.normal_(embedding.weight, std=0.02)
    with torch.no_grad():
        embedding.weight[1] = 0
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.LayerNorm(32), head)
    tokens = torch.randint(2, 40, (4, 16))
    plan = neuro.convert(model, neuro.calibrate(model, [tokens]), neuro.analyse(model, tokens))
    wanted = model(tokens).detach()
    error = (neuro.deploy(model, plan)(tokens) - wanted).square().mean().sqrt() / wanted.std()
    assert float(error) < 0.02
