"""GPT-2, Llama and BERT of Hugging Face (random weights), nn.TransformerEncoder and our own: nothing is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuro.analysis.compatibility import CompatibilityReport, analyse
from neuro.analysis.preparation import prepare
from sparse_update.transformer import ModelConfig, Transformer

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, VOCABULARY, CONTEXT, LAYERS = 16, 2, 40, 8, 2
Model = tuple[nn.Module, dict[str, Any]]


def gpt2() -> Model:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens(), "use_cache": False}


def llama() -> Model:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


def bert() -> Model:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=16,
    )
    mask = torch.ones(2, CONTEXT, dtype=torch.long)
    mask[1, 5:] = 0
    return transformers.BertModel(config), {"input_ids": tokens(), "attention_mask": mask}


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False), {"src": torch.randn(2, CONTEXT, WIDTH)}


def ours() -> Model:
    config = ModelConfig(
        width=WIDTH, layers=LAYERS, heads=HEADS, context=CONTEXT, vocab_size=VOCABULARY, tie_embeddings=True
    )
    return Transformer(config), {"tokens_BT": tokens()}


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "encoder": encoder, "ours": ours}


def counted_macs(module: nn.Module, inputs: Mapping[str, Any]) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not look into fused kernels
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            module.eval()(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def check(report: CompatibilityReport, module: nn.Module, inputs: Mapping[str, Any]) -> None:
    assert report.traced
    assert round(report.macs_per_token * report.tokens) == counted_macs(module, inputs)
    assert sum(op.parameters for op in report.operations) == report.total_parameters
    assert report.unused_parameters == ()
    assert not [op.kind for op in report.operations if op.kind.startswith("unknown")]
    for op in report.operations:
        assert op.reason
        assert op.chip == "loihi2"
        assert (op.error_bound is not None and op.bound_of != "") == (op.verdict == "approximate"), op
        assert (op.limit != "") == (op.kind == "linear"), op


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_is_seen_before_and_after_preparing(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    before = analyse(model, inputs)
    check(before, model, inputs)
    kinds = {op.kind for op in before.operations}
    assert {"attention scores", "attention softmax", "attention x value", "residual add", "normalisation"} <= kinds

    ready = prepare(model, inputs)
    after = analyse(ready, inputs)
    check(after, ready, inputs)
    assert after.macs_per_token == before.macs_per_token
    assert after.total_parameters == before.total_parameters
    host = [op for op in after.operations if op.macs_per_token and op.runs_on == "host"]
    # Dynamic operands; Llama computes its rotary angles by a product too.
    assert {op.kind for op in host} <= {"attention scores", "attention x value", "matrix product of activations"}
    assert {op.verdict for op in host} == {"host"}
    linear = sum(m.weight.numel() for m in ready.modules() if isinstance(m, nn.Linear))
    rows = dict(after.rows_per_token)
    expected = sum(ready.get_submodule(n).weight.numel() * rows[n] for n in after.mapped)  # type: ignore[operator, union-attr]
    assert after.share("macs") * after.macs_per_token == pytest.approx(expected)
    assert sum(ready.get_submodule(n).weight.numel() for n in after.mapped) == linear  # type: ignore[operator, union-attr, misc]


def test_gpt2_by_hand() -> None:
    torch.manual_seed(0)
    model, inputs = gpt2()
    before = analyse(model.eval(), inputs)
    assert before.mapped == ("lm_head",)
    transposed = [op for op in before.operations if op.kind == "linear (transposed)"]
    assert len(transposed) == 4 * LAYERS
    assert {op.verdict for op in transposed} == {"after transform"}
    assert "neuro.prepare" in before.table()
    after = analyse(prepare(model, inputs), inputs)
    assert len(after.mapped) == 4 * LAYERS + 1
    head = next(op for op in after.operations if op.name == "lm_head")
    embedding = next(op for op in after.operations if op.name == "transformer.wte")
    assert after.tied == ("transformer.wte.weight = lm_head.weight",)
    assert head.macs_per_token == head.parameters == WIDTH * VOCABULARY  # on the chip, counted there
    assert embedding.parameters == 0
    assert "transformer.wte.weight = lm_head.weight" in after.table()
    activation = next(op for op in after.operations if op.name.endswith("mlp.act"))
    assert (activation.verdict, activation.kind) == ("approximate", "activation")
    assert "gelu_tanh" in activation.reason


@pytest.mark.parametrize("name", ["gpt2", "encoder", "ours"])
def test_the_fallback_drops_no_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no export today")

    monkeypatch.setattr(torch.export, "export", refuse)
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    report = analyse(model.eval(), inputs, strict=False)
    assert not report.traced
    assert "no export today" in report.note
    assert round(report.macs_per_token * report.tokens) == counted_macs(model, inputs)
    assert sum(op.parameters for op in report.operations) == report.total_parameters
    rest = [op for op in report.operations if op.kind == "not attributed"]
    attention = 2 * CONTEXT * WIDTH * LAYERS
    if name == "encoder":  # its attention is a leaf, whose products torch's counter gives
        assert not rest
        whole = [op for op in report.operations if op.kind == "attention (whole)"]
        assert [op.macs_per_token for op in whole] == [4 * WIDTH * WIDTH + 2 * CONTEXT * WIDTH] * LAYERS
    else:
        assert [op.macs_per_token for op in rest] == [attention]
