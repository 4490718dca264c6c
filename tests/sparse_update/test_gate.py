"""Selections against sorting by hand, exact resume, and what the gates do to a spoiled stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.corpus import DataConfig, load_corpus
from sparse_update.gate import GateConfig, SequenceGate, TokenGate, band, kept_count, uniform
from sparse_update.stream import WindowStream


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8)).astype(np.uint8)) for _ in range(300)]
    for i in range(20):
        picks = generator.integers(0, 300, 4000) % generator.integers(20, 300)
        (folder / f"{i}.txt").write_bytes(b" ".join(words[j] for j in picks))
    return load_corpus(DataConfig(name="files", path=str(folder)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 10, width=32), min_size=2, max_size=40),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
)
def test_band_keeps_the_ranks_between_the_cuts(scores, keep, cut_share):
    cut = cut_share * (1 - keep)
    found = band(torch.tensor(scores), keep, cut).index.tolist()
    n, kept = len(scores), max(1, round(len(scores) * keep))
    ranked = sorted(range(n), key=lambda i: (scores[i], i))
    first = max(0, n - kept - round(n * cut))
    assert found == sorted(ranked[first : first + kept])
    assert len(found) == kept_count(n, keep)


def test_band_works_row_by_row_and_keeps_order():
    loss = torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert band(loss, 0.4, 0.2).index.tolist() == [[2, 4], [2, 3]]
    assert band(loss, 0.4, 0.0).index.tolist() == [[0, 4], [3, 4]]
    assert band(loss, 0.4, 0.6).index.tolist() == [[1, 3], [0, 1]]


def test_random_control_keeps_as_many_and_every_item_alike():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(2000):
        chosen = uniform((20,), 0.3, generator).index
        assert len(set(chosen.tolist())) == 6
        counts[chosen] += 1
    assert (counts / 2000 - 0.3).abs().max() < 0.05  # five standard errors


def gate_of(corpus, seed=0, garbage=0.3, **kw):
    cfg = GateConfig(
        **{"unit": "sequence", "signal": "ngram", "keep_fraction": 0.7, "noise_cut": 0.2, "pool_windows": 64, **kw}
    )
    stream = WindowStream(corpus, 32, seed=seed, garbage_fraction=garbage)
    return SequenceGate(cfg, stream, corpus.vocab_size, seed=seed + 1)


def test_a_plain_gate_is_the_stream_itself(corpus):
    gate = SequenceGate(GateConfig(), WindowStream(corpus, 32, seed=3), corpus.vocab_size, seed=0)
    stream = WindowStream(corpus, 32, seed=3)
    for _ in range(5):
        assert torch.equal(gate.next(8).tokens, stream.take(8).tokens)
    assert gate.windows_scored == 0
    assert gate.kept_share() == {"clean": 1.0}


@pytest.mark.parametrize("signal", ["ngram", "random"])
def test_batches_have_one_shape_and_the_rate_is_exact(corpus, signal):
    gate = gate_of(corpus, signal=signal, noise_cut=0.2 if signal == "ngram" else 0.0)
    for _ in range(40):
        assert gate.next(16).tokens.shape == (16, 33)
    assert int(gate.kept_by_source.sum()) / gate.windows_offered == pytest.approx(round(64 * 0.7) / 64)
    assert gate.windows_scored == (gate.windows_offered if signal == "ngram" else 0)


def test_surprise_drops_the_garbage_that_random_keeps(corpus):
    surprise, control = gate_of(corpus), gate_of(corpus, signal="random", noise_cut=0.0)
    for gate in (surprise, control):
        for _ in range(60):
            gate.next(32)
    kept, kept_at_random = surprise.kept_share(), control.kept_share()
    assert kept["random"] < 0.1
    assert kept["clean"] > 0.8
    assert all(0.55 < share < 0.85 for share in kept_at_random.values())


@pytest.mark.parametrize("signal", ["ngram", "random"])
def test_resume_is_exact_in_the_middle_of_a_pool(corpus, signal):
    kw = {"signal": signal, "noise_cut": 0.2 if signal == "ngram" else 0.0}
    first = gate_of(corpus, **kw)
    for _ in range(7):
        first.next(16)
    second = gate_of(corpus, seed=9, **kw)  # other seeds: all must come from the state
    second.stream = WindowStream(corpus, 32, seed=0, garbage_fraction=0.3)
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        a, b = first.next(16), second.next(16)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.source, b.source)
    assert first.kept_share() == second.kept_share()


def test_token_gate_gives_fixed_ascending_rows():
    loss = torch.rand(4, 12)
    for signal in ("random", "token_loss"):
        gate = TokenGate(GateConfig(unit="token", signal=signal, keep_fraction=0.5), seed=0)
        rows = gate.rows()(loss)
        assert rows.shape == (4, 6)
        assert torch.all(rows.diff(dim=1) > 0)
    assert TokenGate(GateConfig(), seed=0).rows() is None


@pytest.mark.parametrize(
    ("kw", "word"),
    [
        ({"unit": "sequence", "signal": "token_loss"}, "cannot gate unit 'sequence'"),
        ({"unit": "word"}, "sequence"),
        ({"unit": "token", "signal": "random", "keep_fraction": 0.0}, r"\(0, 1\]"),
        ({"unit": "token", "signal": "random", "keep_fraction": 1.2}, r"\(0, 1\]"),
        ({"unit": "token", "signal": "random", "keep_fraction": 0.8, "noise_cut": 0.3}, "noise_cut"),
        ({"keep_fraction": 0.5}, "gate.unit"),
        ({"unit": "sequence", "signal": "ngram", "pool_windows": 1}, "pool"),
    ],
)
def test_bad_gates_are_refused(kw, word):
    with pytest.raises(ValueError, match=word):
        GateConfig(**kw)
