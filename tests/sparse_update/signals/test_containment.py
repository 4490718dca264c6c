"""The signal "containment" against a set of shingles, as closed forms, and in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.data.records import Batch
from sparse_update.signals import SignalContext, SignalError, make_signal
from sparse_update.signals.containment import SAMPLED_BITS, run_hashes


def batch_of(tokens):
    return Batch(tokens, torch.zeros(len(tokens), dtype=torch.int8), torch.arange(len(tokens)))


def text(windows, length=129, vocab=200, seed=0):
    return torch.randint(0, vocab, (windows, length), generator=torch.Generator().manual_seed(seed))


def containment(**options):
    return make_signal("containment", SignalContext(256, 128), options)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_it_is_the_share_of_sampled_shingles_in_the_set_of_those_before(vocab, seed, shingle, calls):
    tokens = text(12, 40, vocab, seed)
    signal, before = containment(shingle=shingle), set()
    found = torch.cat([signal.score(batch_of(part)) for part in tokens.chunk(calls)])
    for row, window in enumerate(tokens):
        sampled = run_hashes(window[None], shingle)[0] & ((1 << SAMPLED_BITS) - 1) == 0
        runs = [tuple(window[i : i + shingle].tolist()) for i in sampled.nonzero()[:, 0].tolist()]
        expected = sum(run in before for run in runs) / len(runs) if runs else 0.0
        assert float(found[row]) == pytest.approx(expected)
        before |= set(runs)


def test_equal_runs_have_equal_hashes_wherever_they_lie_and_others_do_not():
    line = text(1, 400)[0]
    hashes = run_hashes(torch.stack((line[:100], line[7:107])), 16)
    assert torch.equal(hashes[0, 7:], hashes[1, :-7])
    assert len(run_hashes(line[None], 16).unique()) == 400 - 15


def test_repeats_are_found_at_any_offset_and_by_how_much_they_share():
    line = text(1, 20001)[0]
    before = line[: 128 * 100].unfold(0, 129, 128)
    signal = containment()
    assert signal.score(batch_of(before)).max() < 0.2  # only what overlaps by the one token
    assert signal.score(batch_of(before)).min() > 0.9  # a slot or two were taken by other runs
    moved = torch.stack([line[128 * i + 50 : 128 * i + 179] for i in range(98)])
    # runs of 16 that lie across the border of two windows were never in one
    assert signal.score(batch_of(moved)).mean() == pytest.approx(1 - 15 / 114, abs=0.03)
    half = torch.cat((before[:, :65], text(len(before), 64, seed=5)), dim=1)
    assert signal.score(batch_of(half)).mean() == pytest.approx(50 / 114, abs=0.03)


def test_an_edited_repeat_scores_what_edits_leave_of_its_runs():
    windows, rate = text(300), 0.02
    signal = containment()
    signal.score(batch_of(windows))
    generator = torch.Generator().manual_seed(3)
    edited = torch.where(torch.rand(windows.shape, generator=generator) < rate, windows + 1, windows)
    assert signal.score(batch_of(edited)).mean() == pytest.approx((1 - rate) ** 16, abs=0.03)


def test_old_text_fades_where_the_table_is_full_and_memory_stays():
    signal = containment(bits=8)
    old = text(2)
    signal.score(batch_of(old))
    assert (signal.score(batch_of(old)) > 0.7).all()
    signal.score(batch_of(text(400, seed=1)))
    assert signal.score(batch_of(old)).max() < 0.2
    assert signal.state_dict()["tags"].shape == (256,)


def test_what_cannot_be_is_refused():
    for options, match in (({"shingle": 12}, "power of two"), ({"bits": 40}, "8 to 28")):
        with pytest.raises(SignalError, match=match):
            containment(**options)
    with pytest.raises(SignalError, match="another size"):
        containment(bits=9).load_state_dict(containment(bits=10).state_dict())
