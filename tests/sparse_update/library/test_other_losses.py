"""Another loss in the backward of a gated one: refused by name, or given all of its gradient."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from sparse_update import attach
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.chain import HALF, V, by_hand, data, gated, grads, make, plus, same


def distilled(logits, x):
    return F.kl_div(logits.log_softmax(-1), make(3)(x).softmax(-1).detach(), reduction="batchmean")


def test_another_loss_in_the_backward_is_refused_and_others_has_all_of_its_gradient():
    x, y = data()
    model, gate = gated()
    logits = model(x)
    with pytest.raises(GateError, match=r"^3: another loss runs in the backward"):
        (gate.loss(logits, y) + distilled(logits, x)).backward()
    model.zero_grad()
    logits = model(x)
    gate.loss(logits, y, others=distilled(logits, x)).backward()
    plain = make()
    distilled(plain(x), x).backward()
    same(grads(model), plus(by_hand(x, y), grads(plain)))


def test_a_penalty_on_parameters_is_no_loss_of_rows():
    x, y = data()
    model, gate = gated()
    (gate.loss(model(x), y) + 0.5 * sum(p.square().sum() for p in model.parameters())).backward()
    same(grads(model), plus(by_hand(x, y), {n: p.detach() for n, p in make().named_parameters()}))


def test_a_second_head_in_the_same_backward_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.ahead = make(), nn.Linear(16, V)

        def forward(self, x):
            h = self.body[2](self.body[1](self.body[0](x)))
            return self.body[3](h), self.ahead(h)

    x, y = data()
    gate = attach(model := Two(), HALF)
    one, two = model(x)
    with pytest.raises(GateError, match=r"^ahead: another loss"):
        (gate.loss(one, y) + F.cross_entropy(two.flatten(0, 1), y.flatten())).backward()
