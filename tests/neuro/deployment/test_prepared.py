"""convert and deploy prepare by themselves, on a copy, and say what it gained; no look at a module changes its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import neuro
from neuro.analysis.preparation import prepared_copy
from neuro.deployment.sensitivity import layer_errors

transformers = pytest.importorskip("transformers")


def gpt2() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0))
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "use_cache": False}


def normed() -> tuple[nn.Module, Any]:
    layers = [weight_norm(nn.Linear(16, 64)), nn.ReLU(), spectral_norm(nn.Linear(64, 16)), nn.Linear(16, 16)]
    return nn.Sequential(*layers), torch.randn(8, 16)


def hooked() -> tuple[nn.Module, Any]:
    """The older weight hooks of torch, after a call with gradients (the weights hang on a graph)."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        first = nn.utils.weight_norm(nn.Linear(16, 64))
    layers = [first, nn.ReLU(), nn.utils.spectral_norm(nn.Linear(64, 16)), nn.Linear(16, 16)]
    prune.l1_unstructured(layers[3], "weight", 0.5)
    model, inputs = nn.Sequential(*layers), torch.randn(8, 16)
    model(inputs)
    return model, inputs


def attention() -> tuple[nn.Module, Any]:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(3, 5, 16)


MODELS = {
    "gpt2": (gpt2, "8 x Conv1D"),
    "normed": (normed, "2 x parametrised Linear"),
    "hooked": (hooked, "3 x Linear with a weight hook"),
    "attention": (attention, "1 x MultiheadAttention"),
}


def run(module: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = module(**inputs) if isinstance(inputs, dict) else module(inputs)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_calls_give_what_preparing_by_hand_gives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, kinds = MODELS[name]
    model, inputs = build()
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(part) for part in model.modules()]
    report = neuro.analyse(model, inputs)
    plan = neuro.convert(model, neuro.calibrate(model, [inputs]), report)
    deployed = neuro.deploy(model, plan)

    ready = neuro.prepare(model, inputs)
    by_hand = neuro.analyse(ready, inputs)
    assert by_hand.preparation is None
    other = neuro.deploy(ready, neuro.convert(ready, neuro.calibrate(ready, [inputs]), by_hand))
    assert plan.modules == other.plan.modules
    assert torch.equal(run(deployed, inputs), run(other, inputs))
    assert [c.synops for c in deployed.counts()] == [c.synops for c in other.counts()]

    gained = f"{by_hand.mac_share:.1%}"
    first = report.table().splitlines()[0]
    assert first.startswith(f"Preparing gains: with {kinds} as nn.Linear, {gained} of the MACs")
    assert f"instead of {report.mac_share:.1%}" in first
    assert report.markdown().startswith(first)
    assert plan.table().splitlines()[0].startswith(f"Prepared: {kinds} became nn.Linear on a copy; {gained} of the MACs")
    assert report.to_dict()["preparation"]["macs_share"] == by_hand.mac_share
    assert by_hand.mac_share > 1.9 * report.mac_share

    assert [type(part) for part in model.modules()] == classes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert run(model, inputs).isfinite().all()  # its own layers still work
    again = neuro.load_deployed(neuro.save_deployed(deployed, tmp_path / "saved"), model)
    assert again.plan.prepared == plan.prepared
    assert torch.equal(run(again, inputs), run(other, inputs))
    errors = layer_errors(model, plan, [inputs])
    assert len(errors) == len(plan.segments)


def test_the_first_line_is_the_tables_head_where_nothing_is_to_prepare() -> None:
    report = neuro.analyse(nn.Linear(4, 4), torch.randn(2, 4))
    assert report.preparation is None
    assert report.table().startswith("operation ")


def test_a_converter_that_fails_leaves_its_layers_on_the_host_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2, add_zero_attn=True))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            h = self.parts[0](x)
            return self.parts[1](h, h, h)[0]

    report = neuro.analyse(Wrapped().eval(), torch.randn(3, 8))
    assert report.mapped == ("parts.0",)
    first = report.table().splitlines()[0]
    assert first.startswith("Preparing failed, so these layers stay on the host: layer 'parts.1' (MultiheadAttention)")


class Counter(nn.Module):
    """State of every kind: a buffer, a plain tensor, tensors in a list and a dict, a number, and one made on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.zeros(4))
        self.plain, self.listed, self.named, self.calls = torch.zeros(4), [torch.zeros(4)], {"v": torch.zeros(4)}, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        charge = y.detach().sum(dim=0)
        self.buffer += charge
        self.plain = self.plain + charge
        self.listed[0].add_(charge)
        self.named["v"] = self.named["v"] + charge
        self.named["more"] = charge
        self.calls += 1
        self.cache = charge
        return y + self.buffer


def state(module: Counter) -> list[Any]:
    tensors = [module.buffer, module.plain, *module.listed, *module.named.values()]
    return [*(t.tolist() for t in tensors), list(module.named), module.calls, hasattr(module, "cache")]


def test_no_look_at_a_module_charges_it() -> None:
    torch.manual_seed(0)
    module, x = Counter().train(), torch.randn(3, 4)
    with torch.no_grad():
        module(x)
    del module.cache
    before, buffer = state(module), module.buffer
    report = neuro.analyse(module, x)
    assert state(module) == before
    ranges = neuro.calibrate(module, [x, x])
    assert state(module) == before
    neuro.prepare(module, x)
    assert state(module) == before
    deployed = neuro.deploy(module, neuro.convert(module, ranges, report))
    assert state(module) == before
    assert state(deployed.module)[0] == before[0]  # type: ignore[arg-type]
    assert module.buffer is buffer
    assert module.training


def test_membranes_of_snntorch_are_as_before_calibration_also_after_training() -> None:
    snn = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), snn.Leaky(0.9, init_hidden=True), nn.Linear(32, 8), snn.Leaky(0.9, init_hidden=True)]
    model, x = nn.Sequential(*layers), torch.randn(6, 4, 16) * 3
    model(x[0]).sum().backward()  # its membranes now hang on an autograd graph
    held = [part.mem for part in model if isinstance(part, snn.Leaky)]
    values = [mem.detach().clone() for mem in held]
    report = neuro.analyse(model, x[0])
    deployed = neuro.deploy(model, neuro.convert(model, neuro.calibrate(model, list(x)), report))
    for part, mem, value in zip((model[1], model[3]), held, values, strict=True):
        assert part.mem is mem
        assert torch.equal(part.mem, value)
    for part, value in zip((deployed.module[1], deployed.module[3]), values, strict=True):  # type: ignore[index]
        assert torch.equal(part.mem, value)


def test_a_copy_of_a_normed_layer_does_not_take_the_originals_weight_away() -> None:
    module = normed()[0].eval()
    wanted = module(torch.ones(2, 16))
    copied = prepared_copy(module)
    assert type(copied[0]) is nn.Linear  # type: ignore[index]
    assert torch.equal(module(torch.ones(2, 16)), wanted)
    assert torch.allclose(copied(torch.ones(2, 16)), wanted, atol=1e-6)
