"""GPT-2 and BERT of Hugging Face (random weights) through the same calls as any module: prepare, analyse, calibrate,
convert, deploy; tied weights and hooks kept, nothing half-converted.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuro
from neuro.deployment.stand_ins import PairFirst, PairLast, SingleLinear

transformers = pytest.importorskip("transformers")

VOCABULARY, CONTEXT = 40, 16
CONFIGS = {
    "graded": neuro.GradedConfig(),
    "sigma_delta": neuro.SigmaDeltaConfig(),
    "rate": neuro.RateConfig(128),
}
LARGEST_ERROR = {"graded": 0.06, "sigma_delta": 0.06, "rate": 0.12}  # root mean square, relative to the float model


def stirred(model: nn.Module) -> nn.Module:
    """Biases and norms that are not 0 and 1, so that a lost one shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def gpt2(activation: str = "gelu_new") -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=4,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
    )
    return stirred(transformers.GPT2LMHeadModel(config)), {"input_ids": tokens(), "use_cache": False}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    mask = torch.ones(4, CONTEXT, dtype=torch.long)
    mask[1, 9:] = 0
    return stirred(transformers.BertModel(config)), {"input_ids": tokens(), "attention_mask": mask}


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(0))


def first(output: Any) -> Tensor:
    found: Tensor = output[0]
    return found.detach()


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).square().mean() / (b - b.mean()).square().mean()).sqrt())


@pytest.mark.parametrize("route", CONFIGS)
@pytest.mark.parametrize(("build", "layers"), [(gpt2, 2 * 4 + 1), (bert, 2 * 6 + 1)])
def test_the_same_calls_deploy_them(build: Any, layers: int, route: str, tmp_path: Path) -> None:
    model, inputs = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = first(model(**inputs))
    ready = neuro.prepare(model, inputs)
    report = neuro.analyse(ready, inputs, route=route)
    plan = neuro.convert(ready, neuro.calibrate(ready, [inputs]), report, CONFIGS[route])
    deployed = neuro.deploy(ready, plan)
    assert relative(first(deployed(**inputs)), wanted) < LARGEST_ERROR[route]
    assert relative(first(neuro.deploy(ready, plan, "quantised")(**inputs)), wanted) < LARGEST_ERROR[route]

    assert len(plan.modules) == layers
    assert not [n for n, m in deployed.module.named_modules() if isinstance(m, nn.Linear)]  # nothing half-converted
    stand_ins = [n for n, m in deployed.module.named_modules() if isinstance(m, SingleLinear | PairFirst | PairLast)]
    assert sorted(stand_ins) == sorted(plan.modules)
    counted = [c for c in deployed.counts() if not c.host]
    assert {c.layer for c in counted} >= set(plan.modules)
    assert all(c.synops > 0 for c in counted if c.layer in plan.modules)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = neuro.load_deployed(neuro.save_deployed(deployed, tmp_path / "saved"), ready)
    assert torch.equal(first(again(**inputs)), first(deployed(**inputs)))


def test_padding_stays_masked() -> None:
    model, inputs = bert()
    ready = neuro.prepare(model, inputs)
    plan = neuro.convert(ready, neuro.calibrate(ready, [inputs]), neuro.analyse(ready, inputs))
    deployed = neuro.deploy(ready, plan)
    other = inputs["input_ids"].clone()
    other[1, 9:] = (other[1, 9:] + 1) % VOCABULARY
    a, b = (first(deployed(input_ids=ids, attention_mask=inputs["attention_mask"])) for ids in (tokens(), other))
    assert torch.equal(a[1, :9], b[1, :9])
    assert not torch.equal(a[1, 9:], b[1, 9:])


def test_a_relu_mlp_of_theirs_is_one_graph() -> None:
    model, inputs = gpt2("relu")
    ready = neuro.prepare(model, inputs)
    plan = neuro.convert(ready, neuro.calibrate(ready, [inputs]), neuro.analyse(ready, inputs))
    assert [s.modules for s in plan.segments if s.activation] == [
        (f"transformer.h.{i}.mlp.c_fc", f"transformer.h.{i}.mlp.c_proj") for i in range(2)
    ]
    assert relative(first(neuro.deploy(ready, plan)(**inputs)), first(model(**inputs))) < 0.06


def test_the_tied_head_leaves_the_embedding_on_the_host() -> None:
    model, inputs = gpt2()
    ready = neuro.prepare(model, inputs)
    assert ready.lm_head.weight is ready.transformer.wte.weight  # type: ignore[union-attr]
    report = neuro.analyse(ready, inputs)
    plan = neuro.convert(ready, neuro.calibrate(ready, [inputs]), report)
    assert [note for note in plan.notes if "transformer.wte.weight = lm_head.weight" in note]
    deployed = neuro.deploy(ready, plan)
    assert isinstance(deployed.module.lm_head, SingleLinear)
    assert torch.equal(deployed.module.transformer.wte.weight, model.transformer.wte.weight)  # type: ignore[union-attr]
    changed = copy.deepcopy(ready)
    with torch.no_grad():
        changed.transformer.wte.weight[3, 3] += 0.1  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"layer 'lm_head' holds other weights than the plan was made from"):
        neuro.deploy(changed, plan)


def test_hooks_still_fire_on_converted_layers() -> None:
    """On a Conv1D that `prepare` replaces, on a linear layer that `deploy` replaces, and on a module around both."""
    model, inputs = gpt2()
    seen: list[str] = []

    def watch(name: str) -> Any:
        return lambda *args: seen.append(f"{name} {len(args)}")

    attention = model.transformer.h[0].attn  # type: ignore[union-attr, index]
    attention.c_proj.register_forward_hook(watch("conv1d"))  # type: ignore[union-attr, operator]
    attention.register_forward_hook(watch("around"), with_kwargs=True)  # type: ignore[operator]
    model.lm_head.register_forward_hook(watch("head"), with_kwargs=True)  # type: ignore[union-attr, operator]
    model.lm_head.register_forward_pre_hook(watch("before head"), with_kwargs=True)  # type: ignore[union-attr, operator]
    model(**inputs)
    expected, seen[:] = list(seen), []
    assert sorted(expected) == ["around 4", "before head 3", "conv1d 3", "head 4"]
    ready = neuro.prepare(model, inputs)
    plan = neuro.convert(ready, neuro.calibrate(ready, [inputs]), neuro.analyse(ready, inputs))
    deployed = neuro.deploy(ready, plan)
    seen[:] = []
    deployed(**inputs)
    assert seen == expected
