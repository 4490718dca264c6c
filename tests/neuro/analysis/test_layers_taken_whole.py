"""Operations that carry weights or products and have no nn.Linear inside: their multiply-accumulates are in the shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neuro
from neuro.analysis.compatibility import CompatibilityReport

BATCH, STEPS, WIDTH = 3, 5, 8


class Around(nn.Module):
    """A layer, and a linear one behind it, so that something maps."""

    def __init__(self, layer: nn.Module | Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        return self.out(found[0] if isinstance(found, tuple) else found)


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops() // 2


def macs(report: CompatibilityReport, kind: str) -> int:
    return round(sum(op.macs_per_token for op in report.operations if op.kind == kind) * report.tokens)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(
    ("cls", "cell", "settings"),
    [
        (nn.LSTM, nn.LSTMCell, {"num_layers": 2}),
        (nn.GRU, nn.GRUCell, {"bidirectional": True}),
        (nn.RNN, nn.RNNCell, {"bias": False}),
    ],
)
def test_a_recurrent_layer_costs_its_cells(
    cls: type, cell: type, settings: dict, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = cls(WIDTH, 16, batch_first=True, **settings), torch.randn(BATCH, STEPS, WIDTH)
    if fallback:
        monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    report = neuro.analyse(Around(layer, 32 if layer.bidirectional else 16), x)
    assert report.traced != fallback

    def by_cells() -> None:
        for number in range(layer.num_layers):
            one = cell(16 if number else WIDTH, 16)
            for step in range(STEPS * (2 if layer.bidirectional else 1)):
                one(x[:, step % STEPS] if not number else torch.zeros(BATCH, 16))

    assert macs(report, "recurrent layer") == counted(by_cells) > 0
    assert report.mac_share < 0.2
    (row,) = (op for op in report.operations if op.kind == "recurrent layer")
    assert (row.verdict, row.parameters) == ("host", sum(p.numel() for p in layer.parameters()))
    assert row.remedy


def test_other_products_equal_torchs_counter() -> None:
    weight = nn.Parameter(torch.randn(WIDTH, 6))
    functional, both = "linear (functional)", "matrix product of activations"
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor, str]] = [
        (lambda x: torch.tensordot(x, weight, dims=1), torch.randn(BATCH, STEPS, WIDTH), functional),
        (lambda x: torch.tensordot(x, x, dims=([1], [1])), torch.randn(4, WIDTH), both),
        (lambda x: torch.inner(x, weight.T.contiguous()), torch.randn(BATCH, WIDTH), both),
        (lambda x: torch.inner(x, weight.T), torch.randn(BATCH, WIDTH), both),
        (nn.ConvTranspose2d(WIDTH, 6, 3, stride=2, groups=2), torch.randn(2, WIDTH, 5, 5), "convolution"),
    ]
    for number, (work, x, kind) in enumerate(cases):
        net = Around(work, work(x).shape[-1])
        wanted = counted(lambda work=work, x=x: work(x))
        assert macs(neuro.analyse(net, x), kind) == wanted > 0, number


def test_a_bilinear_layer_is_two_products() -> None:
    layer, x = nn.Bilinear(WIDTH, 7, 6), torch.randn(BATCH, WIDTH)

    def by_products() -> None:
        inner = x @ layer.weight.transpose(0, 1).reshape(WIDTH, 6 * 7)
        (inner.view(BATCH, 6, 7) @ x[:, :7, None]).sum()

    report = neuro.analyse(Around(lambda v: layer(v, v[:, :7]), 6), x)
    assert macs(report, "bilinear") == counted(by_products)


def test_experts_chosen_by_a_router_count() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    report = neuro.analyse(
        transformers.MixtralForCausalLM(config), {"input_ids": torch.randint(0, 20, (2, 6)), "use_cache": False}
    )
    experts = sum(op.macs_per_token for op in report.operations if op.name.endswith("experts"))
    assert experts == 2 * 3 * 16 * 24  # two experts a token, three matrices each
    assert not [op.kind for op in report.operations if op.kind.startswith("unknown")]


def test_what_has_no_rule_is_said_below_the_table() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.weight)

    report = neuro.analyse(Around(Odd(), WIDTH), torch.randn(BATCH, WIDTH))
    (odd,) = (op for op in report.operations if op.kind.startswith("unknown: "))
    assert "what it multiplies with its parameters is not counted" in odd.reason
    assert f"no rule for {odd.kind.removeprefix('unknown: ')}: the host runs them" in report.table()
    known = neuro.analyse(Around(nn.ReLU(), WIDTH), torch.randn(BATCH, WIDTH))
    assert "no rule for" not in known.table()


def test_a_reparametrised_layer_says_how_to_free_it() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(BATCH, WIDTH)
    nn.utils.parametrizations.weight_norm(model[0])
    report = neuro.analyse(model, x)
    (held,) = (op for op in report.operations if op.kind == "linear" and op.runs_on == "host")
    assert held.name == "0"
    assert "computed anew at every call" in held.reason
    assert "remove_parametrizations" in report.table()
    wanted = model(x)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert torch.allclose(model(x), wanted)
    assert neuro.analyse(model, x).mapped == ("0", "2")
