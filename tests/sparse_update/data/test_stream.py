"""Streams of several sources, edits, filters and regimes: shares as asked, exact at any position, no held-out text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.domains import docs_and_code
from sparse_update.data.filters import FilterStream
from sparse_update.data.mixture import MixtureStream, Part
from sparse_update.data.records import Corpus, CorpusError, Document, Span
from sparse_update.data.regimes import DOCUMENT_WINDOWS, held_out, held_out_starts, judging, make_stream, prequential
from sparse_update.data.sources import register_source, split
from sparse_update.data.stream import WindowStream
from sparse_update.data.tokens import ByteTokenizer


def lettered(sizes: dict[str, int], val: int = 300) -> Corpus:
    """One domain after the other; tokens of domain k are k * 1000 and up, counting; held-out tokens are 60000 and up."""
    train = np.concatenate([k * 1000 + np.arange(n) % 1000 for k, n in enumerate(sizes.values())]).astype(np.uint16)
    held = np.concatenate([np.full(val, 60_000 + k) for k in range(len(sizes))]).astype(np.uint16)
    ends = np.cumsum([0, *sizes.values()])
    spans = {name: Span((int(ends[k]), int(ends[k + 1])), (k * val, (k + 1) * val)) for k, name in enumerate(sizes)}
    names = tuple(sizes)
    stops = np.arange(len(sizes) + 1) * val
    return Corpus(
        "+".join(names), train, ends, names, held, stops, names, 65_000, len(train), len(held), "cd" * 32, ByteTokenizer(),
        spans, names[0],
    )  # fmt: skip


@pytest.fixture
def two() -> Corpus:
    return lettered({"old": 4001, "new": 2001})


def mixture(corpus: Corpus, seed: int = 0, chances=(0.7, 0.3), edit: float = 0.0, phase: int = 0) -> MixtureStream:
    parts = [
        Part(
            name, span.train[0] + 10 * np.arange((span.train[1] - span.train[0] - 1) // 10), edit if name == "new" else 0.0
        )
        for name, span in corpus.spans.items()
    ]
    return MixtureStream(corpus, 10, seed, parts, chances, phase)


REGIMES = {
    "noisy": {"garbage_fraction": 0.3},
    "multi": {"train_tokens": 30_000},
    "redundant": {"regime": "redundant", "horizon_tokens": 200_000},
    "drift": {"name": "domains", "domains": ["modern", "folio"], "regime": "drift", "horizon_tokens": 20_000},
    "familiar": {"name": "domains", "domains": ["modern", "folio"], "regime": "familiar"},
    "adapt": {"name": "domains", "domains": ["modern", "folio"], "regime": "adapt"},
    "exact": {"regime": "redundant", "horizon_tokens": 200_000, "edit_rate": 0.0, "dedup": "exact"},
    "near": {"regime": "redundant", "horizon_tokens": 200_000, "dedup": "near"},
    "weighted": {
        "name": "domains",
        "domains": ["modern", "folio"],
        "regime": "familiar",
        "source_weights": {"known": 0.3},
    },
}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Corpus, DataConfig]]:
    return {name: (load_corpus(cfg), cfg) for name, cfg in ((n, DataConfig(**s)) for n, s in REGIMES.items())}


def test_windows_carry_the_number_of_the_document_they_begin_in(two):
    """Every token of `two` tells its document: tokens of document k are k * 1000 and up."""
    old_tokens = 4001  # the counting starts anew every 1000 tokens, so the place in the text decides, not the token
    plain = WindowStream(two, 10, seed=0, garbage_fraction=0.3)
    for stream in (mixture(two), FilterStream(mixture(two), {"old": 0.5}), plain):
        batch = stream.take(200)
        assert batch.document.shape == batch.window.shape
        known = batch.window >= 0
        expected = (batch.window[known] * 10 >= old_tokens).long()
        assert torch.equal(batch.document[known], expected)
        assert set(batch.document.tolist()) >= {0, 1}
        assert bool((batch.document[~known] == -1).all())
    assert bool((plain.take(200).document == -1).any())
    assert len(prequential(mixture(two), 50, 10).batch.document) == 10


def test_held_out_starts_are_where_held_out_windows_begin(made):
    for name in ("familiar", "drift", "redundant"):
        corpus, cfg = made[name]
        sets, starts = held_out(corpus, cfg, 64, 6400), held_out_starts(corpus, cfg, 64, 6400)
        assert list(sets) == list(starts)
        for key, windows in sets.items():
            first = int(starts[key][3])
            assert windows[3].tolist() == corpus.val_tokens[first : first + 65].tolist()


# --- mixtures


def test_shares_are_those_asked_for_and_draws_are_independent(two):
    batch = mixture(two).take(550)
    more = torch.cat([batch.source, *(mixture(two, seed=s).take(550).source for s in range(1, 20))]).numpy()
    assert abs(more.mean() - 0.3) < 5 * np.sqrt(0.21 / more.size)
    centred = more - 0.3
    assert abs((centred[1:] * centred[:-1]).mean() / 0.21) < 5 / np.sqrt(more.size)


def test_each_source_shows_every_window_once_before_one_comes_again(two):
    stream = mixture(two)
    batches = [stream.take(500) for _ in range(8)]
    source, tokens = torch.cat([b.source for b in batches]), torch.cat([b.tokens for b in batches])
    window = torch.cat([b.window for b in batches])
    for k, first, count in ((0, 0, 400), (1, 400, 200)):
        own = window[source == k]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count].tolist()) == list(range(first, first + count))
    assert tokens[source == 1].min() >= 1000
    assert tokens[source == 0].max() < 1000


def test_phases_follow_each_other_and_the_last_one_stays(two):
    stream = mixture(two, chances=None, phase=50)
    assert stream.take(150).source.tolist() == [0] * 50 + [1] * 100
    assert stream.source_names == ("old", "new")


def test_any_stretch_is_the_same_whatever_was_read_before(two):
    whole = mixture(two, edit=0.1).read(0, 9000)  # over the ends of chunks and epochs
    for start, n in ((0, 1), (4090, 20), (8191, 3), (5000, 600)):
        part = mixture(two, edit=0.1).read(start, n)
        assert torch.equal(part.tokens, whole.tokens[start : start + n])
        assert torch.equal(part.window, whole.window[start : start + n])
        assert torch.equal(part.source, whole.source[start : start + n])


def test_edits_are_few_and_never_none():
    corpus = lettered({"old": 30_001, "new": 3001})
    parts = [Part("new", np.full(1, 30_005), edit_rate=0.02)]
    stream = MixtureStream(corpus, 128, 0, parts, (1.0,))
    original = corpus.train_tokens[30_005 : 30_005 + 129].astype(np.int64)
    shown = stream.read(0, 2000).tokens.numpy()
    assert not (shown == original).all(axis=1).any()
    assert len({row.tobytes() for row in shown}) > 0.99 * 2000
    alphabet = set(np.unique(corpus.train_tokens).tolist())
    assert set(np.unique(shown).tolist()) <= alphabet
    # Tokens counting up by one show each edit as a break; a third of the edits is of each kind, a substitution breaks
    # twice, an insertion twice, a deletion once: 129 * 0.02 edits, and one more where no substitution was among them.
    breaks = (np.diff(shown, axis=1) != 1).sum(axis=1)
    bare = (1 - 0.02 / 3) ** 129
    expected = 129 * 0.02 * (2 + 2 + 1) / 3 + 2 * bare
    assert breaks.mean() == pytest.approx(expected, rel=0.06)
    assert stream.read(0, 1).tokens.shape == (1, 129)


@pytest.mark.parametrize(
    ("parts", "chances", "message"),
    [
        ([], (1.0,), "none may be empty"),
        ([Part("a", np.zeros(0, dtype=np.int64))], (1.0,), "none may be empty"),
        ([Part("a", np.zeros(1, dtype=np.int64))], (0.9,), "1 in all"),
        ([Part("a", np.zeros(1, dtype=np.int64))], None, "phase_windows"),
    ],
)
def test_mixtures_that_cannot_be(two, parts, chances, message):
    with pytest.raises(ValueError, match=message):
        MixtureStream(two, 10, 0, parts, chances)


# --- all regimes


@pytest.mark.parametrize("name", REGIMES)
def test_resuming_is_exact_and_independent_of_batch_sizes(made, name):
    corpus, cfg = made[name]
    stream, other = make_stream(corpus, cfg, 32, 3), make_stream(corpus, cfg, 32, 3)
    for n in (7, 150, 60, 83):
        stream.take(n)
    for _ in range(6):
        other.take(50)
    state = stream.state_dict()
    fresh = make_stream(corpus, cfg, 32, 3)
    fresh.load_state_dict(state)
    for n in (1, 120, 30):
        a, b, c = stream.take(n), fresh.take(n), other.take(n)
        for x, y, z in zip(*((p.tokens, p.source, p.window) for p in (a, b, c)), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
    assert stream.read_windows == fresh.read_windows == other.read_windows
    assert stream.uses == fresh.uses
    with pytest.raises(ValueError, match="another stream"):
        make_stream(corpus, cfg, 32, 4).load_state_dict(state)
    assert not torch.equal(make_stream(corpus, cfg, 32, 4).take(50).tokens, make_stream(corpus, cfg, 32, 3).take(50).tokens)


@pytest.mark.parametrize("name", ["multi", "drift", "familiar", "redundant"])
def test_no_held_out_text_is_ever_shown(made, name):
    corpus, cfg = made[name]
    stream = make_stream(corpus, cfg, 32, 0)
    shown = {row.tobytes() for _ in range(20) for row in stream.take(200).tokens.numpy().astype(np.uint8)}
    held = corpus.val_tokens.astype(np.uint8)
    common = shown & {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(held, 33)}
    assert len(common) <= 40, common  # of 4,000: title pages and stock lines occur in several works
    assert "modern/hamlet" in corpus.val_names


def test_redundant_repeats_a_small_set_about_as_often_as_asked():
    cfg = DataConfig(regime="redundant", horizon_tokens=256_000, copies=20)
    stream = make_stream(load_corpus(cfg), cfg, 32, 0)
    batch = stream.take(8000)
    assert stream.source_names == ("fresh", "repeated")
    again = batch.source == 1
    assert abs(again.float().mean() - 0.5) < 5 * 0.5 / np.sqrt(8000)
    count = torch.bincount(batch.window[again])
    count = count[count > 0]
    assert len(count) == round(0.5 * 8000 / 20 / DOCUMENT_WINDOWS) * DOCUMENT_WINDOWS
    assert 19 <= count.min() <= count.max() <= 21
    assert len(set(batch.window[~again].tolist())) == int((~again).sum())
    rows = {row.numpy().tobytes() for row in batch.tokens[again]}
    assert len(rows) > 0.99 * int(again.sum()), "exact hashes must fail"
    other = make_stream(load_corpus(cfg), cfg, 32, 1).take(8000)
    assert set(other.window[other.source == 1].tolist()) != set(batch.window[again].tolist())
    with pytest.raises(CorpusError, match="more than half of the"):
        make_stream(load_corpus(cfg), DataConfig(regime="redundant", horizon_tokens=10**9), 32, 0)


def test_held_out_sets_are_by_domain(made):
    corpus, cfg = made["familiar"]
    sets = held_out(corpus, cfg, 64, 6400)
    assert list(sets) == ["val", "known"]
    assert torch.equal(sets["val"], val_windows(corpus, 64, 6400, "folio"))
    assert torch.equal(sets["known"], val_windows(corpus, 64, 6400, "modern"))
    assert not torch.equal(sets["val"], sets["known"])
    corpus, cfg = made["drift"]
    sets = held_out(corpus, cfg, 64, 6400)
    assert list(sets) == ["val", "modern", "folio"]
    assert {name: len(w) for name, w in sets.items()} == {"val": 100, "modern": 100, "folio": 100}
    assert set(map(tuple, sets["val"][:50].tolist())) <= set(map(tuple, sets["modern"].tolist()))
    assert set(map(tuple, sets["val"][50:].tolist())) <= set(map(tuple, sets["folio"].tolist()))
    corpus, cfg = made["redundant"]
    assert torch.equal(held_out(corpus, cfg, 64)["val"], val_windows(corpus, 64))


def test_windows_that_judge_are_training_text_that_the_stream_never_shows(made):
    for name in ("familiar", "drift", "redundant"):
        corpus, cfg = made[name]
        found = judging(corpus, cfg, 64, 1600)
        assert found.tokens.shape == (1600, 65)
        assert len(set(found.window.tolist())) == 1600
        at = np.searchsorted(corpus.train_offsets, found.window * 64, side="right")
        assert len(set(at.tolist())) > 2, "of several documents"
        plain, stream = make_stream(corpus, cfg, 64, 0), make_stream(corpus, cfg, 64, 0, found.window)
        ahead, shown = plain.take(6000).window, stream.take(5000).window
        kept = ahead[~torch.isin(ahead, torch.from_numpy(found.window))]
        assert len(kept) < 6000
        assert torch.equal(shown, kept[:5000])
        with pytest.raises(ValueError, match="another stream"):
            plain.load_state_dict(stream.state_dict())
    assert judging(corpus, cfg, 64, 10**6) is None  # more than the share that may be reserved


def test_known_tokens_are_the_training_text_of_the_known_domain(made):
    corpus, _ = made["familiar"]
    alone = load_corpus(DataConfig())
    assert corpus.known_tokens is not None
    assert torch.equal(corpus.known_tokens, torch.from_numpy(alone.train_tokens.astype(np.int64)))
    assert made["drift"][0].known_tokens is None


def test_adapt_shows_the_new_domain_alone(made):
    corpus, cfg = made["adapt"]
    stream = make_stream(corpus, cfg, 64, 0)
    assert stream.source_names == ("new",)
    start, stop = corpus.spans["folio"].train
    assert stream.windows == (stop - start - 1) // 64
    first = stream.take(1)
    at = start + (int(first.window) - start // 64) * 64
    assert np.array_equal(first.tokens[0].numpy(), corpus.train_tokens[at : at + 65])


def test_train_tokens_takes_a_share_of_every_document(made):
    corpus, cfg = made["multi"]
    assert corpus.train_names == load_corpus(DataConfig()).train_names
    assert abs(len(corpus.train_tokens) - 30_000) < 40
    names, spans = list(corpus.train_names), corpus.train_offsets
    lear = corpus.train_tokens[spans[names.index("modern/lear")] :][:50].astype(np.uint8).tobytes()
    whole = load_corpus(DataConfig())
    at = whole.train_offsets[list(whole.train_names).index("modern/lear")]
    assert lear == whole.train_tokens[at : at + 50].astype(np.uint8).tobytes()
    stream = make_stream(corpus, cfg, 32, 0)
    stream.take(900)
    stream.take(900)
    assert stream.epoch == 1


def test_a_share_ends_between_characters(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_bytes("é".encode() * (50 + i))
    corpus = load_corpus(DataConfig(name="files", path=str(tmp_path), train_tokens=333))
    for start, stop in zip(corpus.train_offsets, corpus.train_offsets[1:], strict=False):
        assert set(corpus.train_tokens[start:stop].astype(np.uint8).tobytes().decode()) == {"é"}


def test_prequential_shows_what_comes_and_moves_nothing(made):
    corpus, cfg = made["drift"]
    stream = make_stream(corpus, cfg, 32, 0)
    stream.take(200)
    before = stream.state_dict()
    seen = prequential(stream, 64, 16)
    assert stream.state_dict() == before
    ahead = stream.take(64)
    assert torch.equal(seen.batch.tokens, ahead.tokens[::4])
    assert seen.source == "modern"
    assert prequential(make_stream(corpus, cfg, 32, 0), 500, 500).source == "modern"
    stream.take(300)
    assert prequential(stream, 64, 16).source == "folio"
    with pytest.raises(ValueError, match=r"choose 1\.\.8"):
        prequential(stream, 8, 9)


# --- filters


def test_exact_dedup_shows_each_text_once_and_fails_on_edits(made):
    corpus, cfg = made["exact"]
    stream = make_stream(corpus, cfg, 32, 0)
    batch = stream.take(4000)
    rows = [row.tobytes() for row in batch.tokens.numpy()]
    assert len(set(rows)) == len(rows)
    assert stream.read_windows > 1.5 * 4000
    assert stream.uses == {"dedup[exact]": stream.read_windows}
    edited = make_stream(*made["redundant"], 32, 0)  # the same with edits
    same = FilterStream(edited, {}, "exact")
    same.take(4000)
    assert same.read_windows < 4000 * 1.01


def test_near_dedup_lets_few_edited_repeats_through():
    cfg = DataConfig(regime="redundant", horizon_tokens=400_000, dedup="near")
    stream = make_stream(load_corpus(cfg), cfg, 128, 0)
    batch = stream.take(2000)
    repeated = int((batch.source == 1).sum())
    offered = int((stream.inner.read(0, stream.read_windows).source == 1).sum())
    different = len(set(batch.window[batch.source == 1].tolist()))
    assert (repeated - different) / offered < 0.15
    fresh = int((stream.inner.read(0, stream.read_windows).source == 0).sum())
    assert int((batch.source == 0).sum()) > 0.98 * fresh
    assert stream.flops(10) > 0
    stream.probe(16)()
    assert stream.uses == {"dedup[near]": stream.read_windows}, "a probe must not count as use"


def test_weights_let_a_share_through_and_cost_nothing(made):
    corpus, cfg = made["weighted"]
    stream = make_stream(corpus, cfg, 32, 0)
    batch = stream.take(3000)
    # 0.7 * 0.3 known against 0.3 new
    share = 0.21 / 0.51
    assert abs(1 - batch.source.float().mean() - share) < 5 * np.sqrt(share * (1 - share) / 3000)
    assert stream.read_windows == pytest.approx(3000 / 0.51, rel=0.05)
    assert (stream.cost_key, stream.uses, stream.flops(5)) == ("", {}, 0)


def test_every_epoch_starts_anew_for_dedup():
    corpus = lettered({"old": 1001}, val=50)
    stream = FilterStream(WindowStream(corpus, 10, 0), {}, "exact")
    first, second = stream.take(100), stream.take(100)
    assert sorted(first.window.tolist()) == sorted(second.window.tolist()) == list(range(100))
    assert stream.epoch == 2


def test_filters_refuse_what_they_cannot_do(two):
    stream = mixture(two)
    for weights, dedup, message in (
        ({"older": 0.5}, "off", "the stream has old, new"),
        ({"old": 1.5}, "off", "shares lie in 0..1"),
        ({"old": 0.0, "new": 0.0}, "off", "one must be above 0"),
        ({}, "fuzzy", "one of off, exact, near"),
    ):
        with pytest.raises(ValueError, match=message):
            FilterStream(stream, weights, dedup)
    with pytest.raises(ValueError, match="filtered again"):
        FilterStream(FilterStream(stream, {"old": 0.5}), {})
    with pytest.raises(ValueError, match="it has no filter"):
        FilterStream(stream, {}).load_state_dict(stream.state_dict())


# --- domains, sources and settings


def test_docstrings_and_code_are_taken_apart():
    source = b'#!/usr/bin/env python\n"""Top."""\nx = """not one"""\n\ndef f(a):\n    """One.\n\n    Two.\n    """\n'
    source += b"    return 1\n"
    docs, code = docs_and_code(source)
    assert docs == b"Top.\n\nOne.\n\nTwo.\n"
    assert code == b'#!/usr/bin/env python\n...\nx = """not one"""\n\ndef f(a):\n    ...\n    return 1\n'
    compile(code, "code", "exec")


def test_docs_and_code_hold_out_the_same_files():
    docs, code = (load_corpus(DataConfig(name="domains", domains=[name])) for name in ("docs", "code"))
    assert {n.removeprefix("docs/") for n in docs.val_names if n.startswith("docs/")} <= {
        n.removeprefix("code/") for n in code.val_names
    }
    assert docs.train_bytes > 1_000_000
    assert b"Return a new" in docs.train_tokens.astype(np.uint8).tobytes()
    assert any(n.startswith("topics/") for n in docs.val_names)


def test_a_source_registered_by_name_is_read():
    @register_source("counting")
    def counting(cfg):
        return split([Document(str(i), b"%d " % i * int(cfg.options["times"])) for i in range(20)], cfg.holdout_fraction)

    corpus = load_corpus(DataConfig(name="counting", options={"times": 5}))
    assert len(corpus.train_names) + len(corpus.val_names) == 20
    assert corpus.name == "counting"
    with pytest.raises(ValueError, match="registered already"):
        register_source("counting")(counting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regime": "chaos"}, "data.regime='chaos' is not known"),
        ({"dedup": "fuzzy"}, "data.dedup='fuzzy' is not known; choose one of off, exact, near"),
        ({"regime": "drift"}, "needs two or more domains"),
        ({"name": "domains"}, "go together"),
        ({"domains": ["modern"]}, "go together"),
        ({"name": "domains", "domains": ["modern", "folio", "code"], "regime": "familiar"}, "the known and the new"),
        ({"name": "domains", "domains": ["modern", "modern"], "regime": "drift"}, "name each domain once"),
        ({"name": "domains", "domains": ["modern", "latin"], "regime": "drift"}, "'latin' is not known"),
        ({"regime": "redundant", "garbage_fraction": 0.3}, "garbage_fraction is of data.regime=plain"),
        ({"edit_rate": 0.9}, "edit_rate=0.9 must lie in 0..0.5"),
        ({"copies": 1}, "at least 2"),
        ({"known_fraction": 1.0}, "known_fraction=1.0"),
        ({"train_tokens": -1}, "train_tokens=-1"),
        ({"source_weights": {"known": 2.0}}, "must lie in 0..1"),
        ({"name": "hf"}, "data.name=hf needs data.path"),
    ],
)
def test_settings_of_regimes_are_checked(settings, message):
    with pytest.raises(ValueError) as caught:
        DataConfig(**settings)
    assert message in str(caught.value)
