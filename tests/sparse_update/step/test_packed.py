"""Several texts in a row against the same texts as rows of their own, for every kind of step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparse_update.step.backward import Stepper
from sparse_update.step.plan import Chosen, StepPlan
from sparse_update.transformer import Packing
from sparse_update.weights.subset import SubsetConfig, choose
from tests.sparse_update.step.test_backward import build, data

TEXTS, LONG = 3, 4
"""Texts in a row, tokens of each: rows are of 12 tokens."""
KEPT = torch.tensor([1, 3])
"""Tokens of each text that are kept, or that go through."""

PLANS = {
    "all": StepPlan(),
    "rows": StepPlan(rows=6),
    "exact rows": StepPlan(rows=6, rows_exact=True),
    "sequences": StepPlan(sequences=2),
    "sequences and rows": StepPlan(sequences=2, rows=6),
    "tokens that pass by": StepPlan(bypass=6),
    "tokens that pass by but give keys": StepPlan(bypass=6, bypass_keys=True),
    "tokens that pass by, and rows": StepPlan(bypass=6, rows=6),
    "sequences, and tokens that pass by": StepPlan(sequences=2, bypass=6),
}


def places(count, packed):
    """Positions of `KEPT` in so many rows, (count, 6) or (count, 2)."""
    starts = torch.arange(TEXTS if packed else 1) * LONG
    return (starts[:, None] + KEPT).flatten().expand(count, -1).contiguous()


def taken(model, x, y, plan, packing=None):
    packed = packing is not None
    if not packed:
        each = {"rows": plan.rows, "bypass": plan.bypass}
        plan = replace(plan, sequences=plan.sequences * TEXTS, **{name: count // TEXTS for name, count in each.items()})
    sequences = torch.tensor([1, 3]) if packed else torch.tensor([3, 4, 5, 9, 10, 11])
    kept = sequences if plan.sequences else None
    rows = places(plan.sequences or len(x), packed) if plan.rows else None
    return Stepper(model).step(
        x, y, plan, choose=lambda view: Chosen(kept, rows), packing=packing,
        bypass_BR=places(len(x), packed) if plan.bypass else None,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_packed_step_is_that_of_its_texts_apart(plan, attention):
    model, (x, y) = build(attention=attention), data()
    segment, position = (torch.arange(12) // LONG).expand(4, -1), (torch.arange(12) % LONG).expand(4, -1)
    packed = taken(model, x, y, PLANS[plan], Packing(segment, position))
    apart = taken(model, x.reshape(-1, LONG), y.reshape(-1, LONG), PLANS[plan])
    torch.testing.assert_close(packed.loss_BT.reshape(-1, LONG), apart.loss_BT)
    assert packed.gradients.keys() == apart.gradients.keys()
    for name, (gradient,) in apart.gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(packed.gradients[name][0], gradient, rtol=1e-9, atol=1e-12, msg=name)
    alone = taken(model, x, y, PLANS[plan], Packing(torch.zeros_like(segment), torch.arange(12).expand(4, -1)))
    assert (alone.loss_BT - packed.loss_BT).abs().max() > 1e-3  # texts that do see each other are another matter


def test_a_part_of_the_weights_on_packed_rows_of_texts_of_other_lengths():
    """Against autograd on the module, whose packing is written apart."""
    model, (x, y) = build(), data()
    segment = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] + [1] * 8 + [2] * 3, [0] * 6 + [1] * 6])
    start = torch.nn.functional.one_hot(segment).cumsum(1).gather(2, segment[..., None])[..., 0] - 1
    packing = Packing(segment, start)
    loss = torch.nn.functional.cross_entropy(model(x, packing=packing).flatten(0, 1), y.flatten())
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    active = choose(model, SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4), turn=0, seed=0)
    step = Stepper(model).step(x, y, StepPlan(), active, packing=packing)
    for name, strips in step.gradients.items():
        parts = active.parts[name]
        assert len(parts) == len(strips)
        for part, strip in zip(parts, strips, strict=True):
            torch.testing.assert_close(strip, part.of(expected[name]), rtol=1e-9, atol=1e-12, msg=name)
