"""Which row of the model's output a row of the loss came from, against one backward for each row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparse_update.library.tracking.tail import NONE, elementwise_source, source_rows

B, T, V = 3, 4, 5
AFTER = {
    "as it is": lambda y: y,
    "cut": lambda y: y[:, :-1],
    "cut in front": lambda y: y[:, 1:],
    "cast": lambda y: y.float(),
    "flat": lambda y: y.reshape(-1, V),
    "scaled": lambda y: y / 2 + 1,
    "turned": lambda y: y.transpose(0, 1),
    "losses": lambda y: F.cross_entropy(y.transpose(1, 2), torch.arange(B * T).view(B, T) % V, reduction="none"),
    "log_softmax": lambda y: y.log_softmax(-1),
    "one place": lambda y: y[:, -1],
    "chosen": lambda y: y.reshape(-1, V)[[7, 2, 4]],
    "twice": lambda y: torch.cat((y, y), 1),
    "mixed": lambda y: y + y.flip(1),
}


def by_hand(result, output, rows):
    """One backward for each row, all columns."""
    reached = torch.zeros(rows, B * T, dtype=torch.bool)
    flat = result.reshape(rows, -1)
    for row in range(rows):
        (g,) = torch.autograd.grad((flat[row] * torch.arange(1, flat.shape[1] + 1)).sum(), output, retain_graph=True)
        reached[row] = (g.reshape(B * T, -1) != 0).any(1)
    found = torch.full((B * T,), NONE)
    for place in range(B * T):
        sources = reached[:, place].nonzero().flatten()
        if len(sources) == 1:
            found[place] = sources[0]
    return found


@pytest.mark.parametrize("name", AFTER)
def test_rows_are_traced_through_what_a_user_does(name):
    torch.manual_seed(0)
    output = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True) * 1
    result = AFTER[name](output)
    rows = result.numel() // V if result.shape[-1] == V else result.numel()
    assert source_rows(result, output, rows).tolist() == by_hand(result, output, rows).tolist()


@given(st.lists(st.integers(0, B * T - 1), min_size=1, max_size=20))
def test_any_choice_of_rows_is_traced(index):
    output = torch.randn(B, T, V, requires_grad=True) * 1
    result = output.reshape(-1, V)[index]
    assert source_rows(result, output, len(index)).tolist() == by_hand(result, output, len(index)).tolist()


def test_what_does_not_come_from_the_output_is_not_traced():
    output = torch.randn(B, T, V, requires_grad=True) * 1
    assert source_rows(torch.randn(B, T, V, requires_grad=True) * 1, output, B * T) is None
    assert source_rows(output.detach(), output, B * T) is None


def test_elements_are_followed_back_without_running_the_graph():
    x = torch.randn(B, T, V, requires_grad=True)
    weight = torch.ones(V, requires_grad=True)
    output, other = x * 2, x * 3
    both = [output, other]
    for made in (
        output,
        output * 2 + 1,
        F.gelu(output * weight),
        F.layer_norm(output, (V,)),
        F.dropout(output, 0.3).double(),
    ):
        assert elementwise_source(made, both) is output
    for made in (
        output.flip(1),
        output.cumsum(1),
        output.softmax(1),
        output + other,
        x * 4,
        output[:, :1] + torch.ones(T, V),
    ):
        assert elementwise_source(made, both) is None
