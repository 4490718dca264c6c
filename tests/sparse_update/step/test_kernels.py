"""Compiled kernels give the eager numbers; a compiler that fails leaves eager steps behind."""

from __future__ import annotations

import pytest
import torch

from sparse_update.step import kernels
from sparse_update.step.backward import Stepper
from sparse_update.step.plan import Chosen, StepPlan
from sparse_update.transformer import ModelConfig, Transformer


def build():
    torch.manual_seed(0)
    return Transformer(ModelConfig(width=16, layers=2, heads=2, context=8, vocab_size=13, attention="explicit"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not kernels.can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize(
    "plan", [pytest.param(StepPlan(), marks=pytest.mark.soak), StepPlan(rows=3)], ids=["whole", "rows"]
)
def test_compiled_steps_equal_eager_ones(plan):
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = torch.randint(0, 13, (3, 9))
    rows = torch.tensor([[0, 3, 5], [1, 2, 7], [4, 5, 6]])
    eager, compiled = Stepper(model), Stepper(model, compiled=True)
    chosen = Chosen(rows_SR=rows if plan.rows else None)
    a, b = (s.step(tokens[:, :-1], tokens[:, 1:], plan, choose=lambda _: chosen) for s in (eager, compiled))
    assert compiled.forward.run.compiled
    torch.testing.assert_close(a.loss_BT, b.loss_BT)
    for name, (gradient,) in a.gradients.items():
        torch.testing.assert_close(b.gradients[name][0], gradient, rtol=1e-4, atol=1e-6)


def test_a_failing_compiler_is_named_and_steps_stay_eager(monkeypatch):
    def broken(function, **options):
        def run(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no compiler"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(kernels, "_COMPILED", {})
    model = build()
    tokens = torch.randint(0, 13, (2, 9))
    stepper = Stepper(model, compiled=True)
    with pytest.warns(UserWarning, match="eager steps"):
        found = stepper.step(tokens[:, :-1], tokens[:, 1:])
    expected = Stepper(model).step(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(found.loss_BT, expected.loss_BT)
    assert not stepper.forward.run.compiled
