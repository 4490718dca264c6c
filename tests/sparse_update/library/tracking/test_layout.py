"""Rules for where tokens lie among a layer's rows: what they keep, how they are found, and on batches of other sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_update.library.tracking.layout import Layout, find_layout


@st.composite
def laid_out(draw, batch=None):
    """A rule and a batch that it holds for: (layout, rows of the layer, B, T)."""
    batch, length = batch or draw(st.integers(1, 4)), draw(st.integers(1, 5))
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    places = before + length + after
    beside = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["BT", "TB", "B_T", "BT_", "one", "one_batch_inner", "parts"]))
    leads = {
        "BT": ((batch, places), Layout(0, 1, "token", before, after)),
        "TB": ((places, batch), Layout(1, 0, "token", before, after)),
        "B_T": ((batch, beside, places), Layout(0, 2, "token", before, after)),
        "BT_": ((batch, places, beside), Layout(0, 1, "token", before, after)),
        "one": ((batch * places, beside), Layout(0, 0, "token", before, after)),
        "one_batch_inner": ((beside, batch * places), Layout(1, 1, "batch", before, after)),
        "parts": ((batch, places), Layout(0, 1, "token", before, after, parts=True)),
    }
    lead, layout = leads[kind]
    return (layout, lead, 1, batch * length) if kind == "parts" else (layout, lead, batch, length)


@given(laid_out(), st.data())
def test_kept_rows_are_those_of_kept_units_and_of_none(case, data):
    layout, lead, batch, length = case
    unit = layout.units(lead, batch, length, torch.device("cpu")).flatten()
    kept = sorted(data.draw(st.sets(st.integers(0, batch * length - 1), min_size=1)))
    groups, size = layout.rows(lead, torch.tensor(kept), batch, length)
    rows = (groups[:, None] * size + torch.arange(size)).flatten()
    assert len(rows) == len(rows.unique())
    expected = [row for row, u in enumerate(unit.tolist()) if u < 0 or u in kept]
    assert sorted(rows.tolist()) == expected


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.data())
def test_kept_sequences_are_kept_whole(batch, before, after, at, data):
    lead = [before, after]
    lead.insert(at, batch)
    layout = Layout(at, -1, whole=True)
    kept = sorted(data.draw(st.sets(st.integers(0, batch - 1), min_size=1)))
    groups, size = layout.rows(tuple(lead), torch.tensor(kept), batch, 1)
    rows = (groups[:, None] * size + torch.arange(size)).flatten()
    unit = layout.units(tuple(lead), batch, 1, torch.device("cpu"))
    number = torch.arange(batch).view([-1 if d == at else 1 for d in range(3)]).expand(lead)
    assert torch.equal(unit, number)
    assert sorted(rows.tolist()) == [r for r, u in enumerate(number.flatten().tolist()) if u in kept]


@given(laid_out(), st.integers(1, 4), st.integers(1, 5))
def test_a_rule_that_was_found_holds_for_other_batches(case, batch, length):
    """What is found has the true rule's units on the batch that was seen; on others too, unless it says it is unsure."""
    layout, lead, seen_batch, seen_length = case
    cpu = torch.device("cpu")
    rows = layout.units(lead, seen_batch, seen_length, cpu)
    known = torch.ones(seen_batch * seen_length, dtype=torch.bool)
    found = find_layout(rows, seen_batch, seen_length, known, False)
    assert found is not None
    assert torch.equal(found.units(lead, seen_batch, seen_length, cpu), rows)
    if found.unsure or layout.parts:
        return
    places = layout.before + length + layout.after
    old = layout.before + seen_length + layout.after
    sizes = {layout.batch_dim: batch, layout.token_dim: places}
    if layout.batch_dim == layout.token_dim:
        sizes = {layout.batch_dim: batch * places}
    assert layout.split(lead, seen_batch) is not None
    assert old > 0
    other = tuple(sizes.get(d, n) for d, n in enumerate(lead))
    assert torch.equal(found.units(other, batch, length, cpu), layout.units(other, batch, length, cpu))


@given(st.integers(2, 4), st.integers(2, 5), st.randoms(use_true_random=False))
def test_an_order_that_no_rule_makes_is_not_taken_for_one(batch, length, random):
    number = list(range(batch * length))
    random.shuffle(number)
    rows = torch.tensor(number).view(batch, length)
    known = torch.ones(batch * length, dtype=torch.bool)
    found = find_layout(rows, batch, length, known, False)
    if found is not None:
        assert torch.equal(found.units((batch, length), batch, length, torch.device("cpu")), rows)


@pytest.mark.parametrize("lead", [(3, 5), (2, 4), (2,), (10,), (2, 6)])
def test_rows_of_another_size_are_not_told(lead):
    layout = Layout(0, 1)
    assert layout.rows(lead, torch.tensor([0]), 2, 5) is None
