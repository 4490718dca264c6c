"""Labels: what they cost, what they become where rows meet, and which of them are one row."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from sparse_update.library.tracking.labels import (
    DATA,
    NONE,
    Streams,
    compress,
    convolved,
    moved_by_data,
    narrow,
    product,
    settled,
    uniform,
)

CPU = torch.device("cpu")


def some(shape, seed, most=3):
    return torch.randint(-1, most, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@given(array_shapes(min_dims=1, max_dims=4, max_side=4), st.integers(0, 999))
def test_a_compressed_label_is_the_same_label(shape, seed):
    label = some(shape, seed, 2)
    found = compress(label)
    if found is None:
        assert bool((label < 0).all())
    else:
        assert torch.equal(found, label)
        assert narrow(found).numel() <= label.numel()


@given(array_shapes(min_dims=1, max_dims=4, max_side=3), st.integers(0, 999), st.data())
def test_uniform_keeps_what_is_constant_along_dimensions(shape, seed, data):
    label = some(shape, seed, 1)
    dims = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    found = uniform(label, dims)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in shape]).view(-1, len(shape)).tolist():
        line = label[tuple(slice(None) if d in dims else p for d, p in enumerate(place))]
        expected = int(line.flatten()[0]) if bool((line == line.flatten()[0]).all()) else NONE
        assert found[tuple(0 if d in dims else p for d, p in enumerate(place))] == expected


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_a_product_has_the_rows_of_its_first_factor(m, k, n, seed):
    a, b = some((m, 1), seed), some((1, n), seed + 1)
    found = product(a.expand(m, k), b.expand(k, n), (m, n))
    found = torch.full((m, n), NONE, dtype=torch.int32) if found is None else found
    assert torch.equal(found, a.expand(m, n).where(a >= 0, b.expand(m, n)))


def test_labels_of_an_activation_take_one_number_for_each_row():
    label = Streams().fresh((4, 12), CPU)[..., None].expand(4, 12, 1024)
    found = compress(label.clone())
    assert found.untyped_storage().nbytes() == 4 * 12 * 4
    assert torch.equal(found, label)


def test_a_token_mixed_with_its_neighbour_stays_itself():
    streams = Streams()
    own = streams.fresh((2, 5), CPU)[..., None]
    before = torch.nn.functional.pad(own, (0, 0, 1, -1), value=NONE)
    for pair in ((own, before), (before, own)):
        assert torch.equal(streams.merge(pair, (2, 5, 1)), own)
    assert bool((streams.merge((own, own.flip(1)), (2, 5, 1))[:, [0, 1, 3, 4]] == NONE).all())  # neither is the row
    steps = own[:, 2], own[:, 1]  # parts of the stream: the later one, as in a recurrence
    assert torch.equal(streams.merge(steps, (2, 1)), own[:, 2])


def test_two_samples_make_none():
    streams = Streams(whole=True)
    one = streams.fresh((4,), CPU)
    assert streams.merge((one, one.roll(1)), (4,)).tolist() == [NONE] * 4
    other = streams.fresh((4,), CPU)
    assert streams.merge((one, other), (4,)).tolist() == one.tolist()
    rows = streams.linked(torch.tensor([0, 1, 2, 3, NONE, NONE, NONE, NONE]))
    assert rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # they met, one by one


def test_pairs_hand_rows_on_through_any_chain():
    streams = Streams()
    chain = [streams.fresh((3,), CPU)[:, None] for _ in range(5)]
    for a, b in itertools.pairwise(chain):
        streams.merge((a, b), (3, 1))
    assert streams.rows_of(chain[0]).tolist() == [0, 1, 2] * 5
    assert streams.rows_of(chain[4]).tolist() == [0, 1, 2] * 5


@pytest.mark.parametrize("first", [True, False])
def test_what_is_in_its_place_for_all_inputs_settles_what_is_not(first):
    streams = Streams()
    own = streams.fresh((3,), CPU)[:, None]
    moved = moved_by_data(own)
    assert torch.equal(settled(moved), own)
    assert bool((moved >= DATA).all())
    assert moved.dtype == torch.int32
    assert torch.equal(streams.merge((own, moved) if first else (moved, own), (3, 1)), own)
    assert torch.equal(streams.merge((moved, moved), (3, 1)), moved)
    assert streams.rows_of(moved).tolist() == [NONE] * 3


@pytest.mark.parametrize(
    ("padding", "dilation", "expected"),
    [(2, 1, [0, 1, 2, 3, 4]), (1, 1, [0, 1, 2, 3, 4]), (4, 2, [0, 1, 2, 3, 4]), (0, 1, None), (3, 2, None)],
)
def test_a_causal_or_centred_convolution_keeps_places(padding, dilation, expected):
    """Kernel of 3 on 5 places: reach 2, or 4 with dilation 2."""
    label = Streams().fresh((1, 5), CPU)[:, None]
    size = 5 + 2 * padding - 2 * dilation
    found = convolved(label, (1, 7, size), [3], [1], [padding], [dilation])
    if expected is None:
        assert found is None
    else:
        assert found[0, 0, :5].tolist() == expected
        assert bool((found[0, 0, 5:] == NONE).all())
