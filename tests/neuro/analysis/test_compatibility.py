"""Verdicts, multiply-accumulates against torch's own counter, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuro.analysis.compatibility import NothingToMap, analyse
from neuro.modules.attention import split_attention
from sparse_update.transformer import ModelConfig, Transformer


def transformer(**changes: object) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 16, "layers": 2, "heads": 2, "context": 8, "vocab_size": 32, **changes})  # type: ignore[arg-type]
    return Transformer(config)


def counted_macs(module: nn.Module, *inputs: Tensor) -> int:
    math = sdpa_kernel(SDPBackend.MATH)  # torch's counter does not know the fused CPU kernel
    with math, FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_macs_equal_torchs_flop_counter(attention: str) -> None:
    model, tokens = transformer(attention=attention), torch.zeros(3, 8, dtype=torch.long)
    report = analyse(model, tokens)
    assert report.tokens == 24
    assert report.macs_per_token * report.tokens == counted_macs(model, tokens)
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert report.mac_share == pytest.approx(linear / report.macs_per_token)


def test_every_functional_operation_has_a_row() -> None:
    report = analyse(transformer(), torch.zeros(1, 8, dtype=torch.long))
    kinds = {op.kind for op in report.operations}
    assert {
        "embedding lookup",
        "normalisation",
        "linear",
        "element-wise product",
        "attention scores",
        "attention softmax",
        "attention x value",
        "residual add",
        "activation",
        "data movement",
    } <= kinds
    assert not any(kind.startswith("unknown") for kind in kinds)
    on_chip = {op.kind for op in report.operations if op.runs_on == "chip"}
    assert on_chip == {"linear", "activation"}
    assert all(op.reason for op in report.operations)
    assert {op.verdict for op in report.operations} <= {"native", "after transform", "approximate", "host"}


def test_pairs_and_crossings() -> None:
    report = analyse(transformer(), torch.zeros(1, 8, dtype=torch.long))
    assert [(p.fc1, p.fc2, p.activation) for p in report.pairs] == [
        (f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2", "relu2") for i in range(2)
    ]
    # in and out: 2 x (q, k, v, o, mlp) + head; bytes: int8 in, 16 bits out
    assert report.crossings_per_token == 2 * (2 * 5 + 1)
    assert report.crossing_bytes_per_token == 2 * 5 * (16 + 2 * 16) + (16 + 2 * 32)


def test_tied_weights_are_named_and_counted_once() -> None:
    report = analyse(transformer(tie_embeddings=True), torch.zeros(1, 8, dtype=torch.long))
    assert report.tied == ("embed.weight = head.weight",)
    assert sum(op.parameters for op in report.operations) == report.total_parameters
    sizes = {op.name: op.bytes for op in report.operations if op.name in ("embed", "head")}
    assert sizes == {"embed": 32 * 16 * 4, "head": 32 * 16}  # the host keeps the float table, the chip an int8 copy


class Functional(nn.Module):
    """Activation by functions, a second reader of the hidden values, a parameter used bare, one never used."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.bare, self.unused = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.fc1(x @ self.bare)
        if self.style == "gelu":
            return self.fc2(F.gelu(h))
        r = F.relu(h)
        if self.style == "power":
            return self.fc2(F.dropout(r**2, 0.1, self.training))
        if self.style == "cube":
            return self.fc2(r**3)
        if self.style == "read twice":
            return self.fc2(r) + r.sum()
        if self.style == "returned":
            return self.fc2(r), h
        return self.fc2(r)


@pytest.mark.parametrize(
    ("style", "activation"),
    [("relu", "relu"), ("power", "relu2"), ("gelu", ""), ("cube", ""), ("read twice", ""), ("returned", "")],
)
def test_pairs_are_recognised_from_the_graph(style: str, activation: str) -> None:
    report = analyse(Functional(style), torch.zeros(5, 4))
    assert tuple(p.activation for p in report.pairs) == ((activation,) if activation else ())
    assert report.mapped == ("fc1", "fc2")
    assert report.unused_parameters == ("unused",)
    bare = next(op for op in report.operations if op.kind == "linear (functional)")
    assert bare.runs_on == "host"
    assert bare.remedy
    assert "parameters no operation reads: unused" in report.table()


def test_encoder_layer_before_and_after_splitting_its_attention() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    report = analyse(layer, x)
    assert report.mapped == ("linear1", "linear2")
    assert "neuro.prepare" in report.table()
    split = split_attention(layer)
    assert analyse(split, x).mapped == (*(f"self_attn.{n}" for n in "qkvo"), "linear1", "linear2")
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for kwargs in ({}, {"src_mask": mask}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            torch.testing.assert_close(split(x, **kwargs), layer(x, **kwargs))
    attention = nn.MultiheadAttention(8, 2, bias=False, kdim=6, vdim=4).eval()  # sequence first, own widths
    with torch.no_grad():
        inputs = torch.randn(5, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4)
        for got, wanted in zip(split_attention(attention)(*inputs), attention(*inputs), strict=True):
            torch.testing.assert_close(got, wanted)


class Branching(nn.Module):
    """torch.export cannot follow a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) if x.sum().item() > 0 else self.mlp(-x) + 1


def test_fallback_says_that_functional_operations_are_unseen() -> None:
    report = analyse(Branching(), torch.ones(3, 4))
    assert not report.traced
    assert report.mapped == ("mlp.0", "mlp.2")
    assert [(p.fc1, p.fc2) for p in report.pairs] == [("mlp.0", "mlp.2")]
    assert report.macs_per_token == 4 * 8 + 8 * 2
    assert "NOT TRACED" in report.table()
    assert report.to_dict()["traced"] is False


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_linear_subclass_that_does_more_stays_on_the_host() -> None:
    report = analyse(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)), torch.zeros(2, 4))
    assert report.mapped == ("1",)


def test_mappable_keeps_layers_on_the_host() -> None:
    model = transformer()
    report = analyse(model, torch.zeros(1, 8, dtype=torch.long), mappable=lambda name, _: name != "head")
    assert "head" not in report.mapped
    assert next(op for op in report.operations if op.name == "head").runs_on == "host"


@pytest.mark.parametrize("module", [nn.Sequential(nn.LayerNorm(4), nn.GELU()), nn.ReLU()])
def test_nothing_to_map(module: nn.Module) -> None:
    with pytest.raises(NothingToMap, match=r"nothing that the graded route can map to loihi2\. Seen: 1 x .*nn\.Linear"):
        analyse(module, torch.zeros(2, 4))


@pytest.mark.parametrize("route", ["graded", "sigma_delta"])
def test_loihi1_takes_no_payloads(route: str) -> None:
    with pytest.raises(NothingToMap, match=r"loihi1.*payload_bits 8 of 1.*map to loihi2, or take route='rate'"):
        analyse(nn.Linear(4, 4), torch.zeros(2, 4), chip="loihi1", route=route)


def test_loihi1_takes_spike_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.GELU(), nn.RMSNorm(4))
    report = analyse(model, torch.zeros(2, 4), chip="loihi1")
    assert (report.chip, report.route, report.mapped) == ("loihi1", "rate", ("0", "2"))
    assert [p.activation for p in report.pairs] == ["relu"]
    by_name = {op.name: op for op in report.operations}
    assert by_name["0"].verdict == by_name["1"].verdict == "after transform"
    assert {by_name[n].runs_on for n in "012"} == {"chip"}
    for name in ("3", "4"):  # a look-up and a norm need payloads
        op = by_name[name]
        assert (op.verdict, op.limit, op.need, op.have, op.error_bound) == ("host", "payload_bits", 16, 1, None)
    squared = analyse(transformer(), torch.zeros(1, 8, dtype=torch.long), chip="loihi1")
    assert squared.pairs == ()  # integrate-and-fire neurons do not square: the host does, between two layers
    assert {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} <= set(squared.mapped)
    assert squared.crossings_per_token == 2 * (2 * 6 + 1)


def test_bad_input_is_refused_with_its_name() -> None:
    model = transformer()
    with pytest.raises(ValueError, match="chip 'tpu' is unknown"):
        analyse(model, torch.zeros(1, 8, dtype=torch.long), chip="tpu")
    with pytest.raises(ValueError, match="does not run on the example inputs"):
        analyse(nn.Linear(4, 4), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="not int"):
        analyse(model, 3)  # type: ignore[arg-type]
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.fc1\.weight' holds 1 NaN"):
        analyse(model, torch.zeros(1, 8, dtype=torch.long))


def test_the_module_is_left_as_it_was() -> None:
    model = transformer().train()
    model.blocks[0].eval()
    flags = [m.training for m in model.modules()]
    analyse(model, torch.zeros(1, 8, dtype=torch.long))
    assert [m.training for m in model.modules()] == flags


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Hardtanh()])
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)])
def test_an_activation_with_two_ends_says_what_it_would_take(activation: nn.Module, layer: nn.Module) -> None:
    model = nn.Sequential(layer, activation, nn.Linear(8, 4)).eval()
    example = torch.rand(2, 8, 8) if isinstance(layer, nn.Conv1d) else torch.rand(2, 8)
    report = analyse(model, example)
    (op,) = (op for op in report.operations if op.name == "1")
    assert (op.kind, op.verdict, op.runs_on) == ("activation with two ends", "after transform", "host")
    assert "relu(x) less relu(x - end)" in op.reason
    assert "remedy: nn.ReLU in place of ReLU6" in report.table()
    assert "no rule for" not in report.table()
    # what the reason says is so
    x = torch.linspace(-3, 9, 200)
    assert torch.allclose(nn.functional.relu6(x), torch.relu(x) - torch.relu(x - 6), atol=1e-6)
