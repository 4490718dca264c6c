"""Code around a replaced layer that reads its weights, calls it by keyword, or hooks it, goes on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuro
from neuro.deployment.stand_ins import SingleLinear


class Reader(nn.Module):
    """Calls a layer by keyword, and multiplies with its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        again = F.linear(x, self.fc.weight.T)
        return self.out(self.fc(input=x.to(self.fc.weight.dtype)) + again)


def converted(model: nn.Module, example: Any) -> neuro.Deployed:
    ready = neuro.prepare(model, example)
    return neuro.deploy(ready, neuro.convert(ready, neuro.calibrate(ready, [example]), neuro.analyse(ready, example)))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std())


def test_a_weight_that_is_read_is_the_hosts_float_copy() -> None:
    model, x = Reader().eval(), torch.randn(20, 16)
    deployed = converted(model, x)
    assert relative(deployed(x), model(x).detach()) < 0.02
    stand_in = deployed.module.fc
    assert isinstance(stand_in, SingleLinear)
    assert torch.equal(stand_in.weight, model.fc.weight)
    assert torch.equal(stand_in.bias, model.fc.bias)
    assert (stand_in.in_features, stand_in.out_features) == (16, 16)
    assert not list(deployed.parameters())  # what is on the chip is no parameter
    assert not deployed.state_dict()
    assert deployed.double().module.fc.weight.dtype == torch.float64  # type: ignore[union-attr]
    report = neuro.analyse(model, x)
    again = [op for op in report.operations if op.kind == "linear (functional)"]
    assert [(op.runs_on, op.macs_per_token) for op in again] == [("host", 256.0)]
    assert sum(op.bytes for op in report.operations if op.runs_on == "host") == 4 * 256  # the copy, where it is read


def test_a_hook_that_looks_at_the_weight() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(20, 16)
    seen: list[float] = []
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda layer, _args, _out: seen.append(float(layer.weight.detach().norm())))
    deployed = converted(model, x)
    seen.clear()
    deployed(x)
    assert seen == [float(model[i].weight.detach().norm()) for i in (0, 2)]


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_models_that_read_the_weights_of_their_layers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 30, (2, 9))
    if name == "t5":  # casts to the dtype of wo.weight
        config = transformers.T5Config(
            vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model: nn.Module = transformers.T5ForConditionalGeneration(config).eval()
        example = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    else:  # multiplies with dt_proj.weight
        model = transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, state_size=4)
        ).eval()
        example = {"input_ids": ids, "use_cache": False}
    deployed = converted(model, example)
    with torch.no_grad():
        wanted = model(**example).logits
    assert relative(deployed(**example).logits, wanted) < 0.06
    assert len([m for m in deployed.module.modules() if isinstance(m, SingleLinear)]) == len(deployed.plan.modules) > 3
