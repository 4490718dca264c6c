"""The stream and the held-out sets that a `DataConfig` asks for: one line per regime.

plain       windows in random order; with `garbage_fraction` the `noisy` regime, with `train_tokens` several epochs
redundant   a share of the positions shows a small set of documents again and again, each time edited a little
drift       domains one after the other, in equal parts of `horizon_tokens`; the last stays
familiar    text of a domain that the model knows, mixed with that of a new one
adapt       the new domain alone

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_update.data.corpus import SHARDS, DataConfig, cut_at, val_starts
from sparse_update.data.filters import FilterStream
from sparse_update.data.hashing import draw, key
from sparse_update.data.mixture import MixtureStream, Part
from sparse_update.data.records import Batch, Corpus, CorpusError
from sparse_update.data.shards.stream import ShardStream
from sparse_update.data.stream import KindStream, Stream, WindowStream, count_windows

DOCUMENT_WINDOWS = 4
"""redundant: a repeated document is this many windows that follow each other."""


RESERVED_STRETCHES = 8
"""Windows that judge are stretches of the training text, so many of them."""
RESERVED_SHARE = 0.05
"""At most this share of the training windows is reserved for them."""


def make_stream(corpus: Corpus, cfg: DataConfig, context: int, seed: int, reserved: np.ndarray | None = None) -> Stream:
    """The training stream of `cfg`, its controls (`source_weights`, `dedup`) included.

    `reserved`: numbers of training windows that it never shows, int64 (N,).

    Raises `CorpusError` where the text is too short for the regime, ValueError for weights of sources it does not have.
    """
    stream = _stream(corpus, cfg, context, seed)
    if not cfg.source_weights and cfg.dedup == "off" and reserved is None:
        return stream
    return FilterStream(stream, cfg.source_weights, cfg.dedup, reserved)


def clean_stream(corpus: Corpus, cfg: DataConfig, context: int, seed: int) -> Stream:
    """The stream of `cfg` for what looks at training text and does not train: garbage of the plain regime is left out."""
    if cfg.regime != "plain":
        return make_stream(corpus, cfg, context, seed)
    return ShardStream(corpus, context, seed) if cfg.name == SHARDS else WindowStream(corpus, context, seed)


def _stream(corpus: Corpus, cfg: DataConfig, context: int, seed: int) -> Stream:
    if cfg.name == SHARDS:
        return ShardStream(corpus, context, seed)
    if cfg.regime == "plain" and corpus.train_kinds and not cfg.garbage_fraction:
        return KindStream(corpus, context, seed)
    if cfg.regime == "plain":
        return WindowStream(corpus, context, seed, cfg.garbage_fraction)
    if cfg.regime == "redundant":
        parts = _fresh_and_repeated(corpus, cfg, context, seed)
        return MixtureStream(corpus, context, seed, parts, (1.0 - cfg.repeated_fraction, cfg.repeated_fraction))
    parts = [Part(name, _starts(corpus, name, context)) for name in cfg.domains]
    if cfg.regime == "drift":
        phase = max(1, cfg.horizon_tokens // context // len(parts))
        return MixtureStream(corpus, context, seed, parts, None, phase)
    known, new = (Part(name, part.starts) for name, part in zip(("known", "new"), parts, strict=True))
    if cfg.regime == "adapt":
        return MixtureStream(corpus, context, seed, [new], (1.0,))
    return MixtureStream(corpus, context, seed, [known, new], (cfg.known_fraction, 1.0 - cfg.known_fraction))


def held_out(corpus: Corpus, cfg: DataConfig, context: int, tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Held-out windows by name, int64 (N, T + 1) each; `tokens` bounds the targets of each set.

    "val" is the set that a run is judged by: untouched text of the trained source; familiar and adapt: of the new domain,
    with "known" for the old one; drift: equal parts of all domains, with each domain's own set under its name.
    """
    starts = held_out_starts(corpus, cfg, context, tokens)
    return {name: cut_at(corpus.val_tokens, places, context) for name, places in starts.items()}


def held_out_starts(corpus: Corpus, cfg: DataConfig, context: int, tokens: int | None = None) -> dict[str, np.ndarray]:
    """Where the windows of `held_out` begin in the held-out text, int64 (N,) each."""
    if cfg.regime in ("familiar", "adapt"):
        known, new = cfg.domains
        return {"val": val_starts(corpus, context, tokens, new), "known": val_starts(corpus, context, tokens, known)}
    if cfg.regime == "drift":
        sets = {name: val_starts(corpus, context, tokens, name) for name in cfg.domains}
        least = min(len(starts) for starts in sets.values())
        share = least if tokens is None else max(1, min(least, tokens // context // len(sets)))
        return {"val": np.concatenate([_evenly(starts, share) for starts in sets.values()]), **sets}
    return {"val": val_starts(corpus, context, tokens)}


@dataclass(frozen=True, eq=False)
class Judges:
    """Windows by which a gate may judge while it trains, int64 (N, T + 1), and their numbers in the stream, int64 (N,)."""

    tokens: torch.Tensor
    window: np.ndarray


def judging(corpus: Corpus, cfg: DataConfig, context: int, count: int) -> Judges | None:
    """Up to `count` windows of the training text of "val", as stretches that lie evenly spread in it.

    They judge only where the stream never shows them (`make_stream(..., reserved=judges.window)`). They are not chosen for
    being new, so that boilerplate counts for what it is in the text, and they are of no document that is held out, so that
    what a run is judged by in the end stays untouched. At most `RESERVED_SHARE` of the training windows; None where that
    is fewer than half of `count`.
    """
    if cfg.regime in ("familiar", "adapt"):
        parts = [_starts(corpus, cfg.domains[1], context)]
    elif cfg.regime == "drift":
        parts = [_starts(corpus, name, context) for name in cfg.domains]
    else:
        parts = [context * np.arange(count_windows(corpus.name, len(corpus.train_tokens), context), dtype=np.int64)]
    starts = np.concatenate([_stretches(part, count // len(parts)) for part in parts])
    if 2 * len(starts) < count:
        return None
    return Judges(cut_at(corpus.train_tokens, starts, context), starts // context)


def _stretches(starts: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `starts`, one stretch in the middle of each of `RESERVED_STRETCHES` equal parts."""
    length = min(count, int(RESERVED_SHARE * len(starts))) // RESERVED_STRETCHES
    middle = (2 * np.arange(RESERVED_STRETCHES) + 1) * len(starts) // (2 * RESERVED_STRETCHES)
    return starts[(middle[:, None] - length // 2 + np.arange(length)).reshape(-1)]


@dataclass(frozen=True)
class Preview:
    """Windows that a stream brings next, spread evenly over a stretch of it, and their most frequent source."""

    batch: Batch
    source: str


def prequential(stream: Stream, every: int, windows: int) -> Preview:
    """`windows` of the next `every` positions of the unfiltered stream: evaluate on them before training on that stretch.

    The same for every arm that stands at the same position. Raises ValueError for more windows than positions.
    """
    if not 1 <= windows <= every:
        raise ValueError(f"prequential: {windows} windows of the next {every}: choose 1..{every}")
    ahead = stream.peek(every)
    rows = torch.arange(windows) * every // windows
    batch = Batch(ahead.tokens[rows], ahead.source[rows], ahead.window[rows], _at(ahead.document, rows))
    return Preview(batch, stream.source_names[int(batch.source.long().bincount().argmax())])


def _at(column: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if column is None else column[rows]


def _evenly(starts: np.ndarray, count: int) -> np.ndarray:
    return starts[(2 * np.arange(count) + 1) * len(starts) // (2 * count)]


def _starts(corpus: Corpus, domain: str, context: int) -> np.ndarray:
    start, stop = corpus.spans[domain].train
    return start + context * np.arange(count_windows(f"{corpus.name}, {domain}", stop - start, context), dtype=np.int64)


def _fresh_and_repeated(corpus: Corpus, cfg: DataConfig, context: int, seed: int) -> list[Part]:
    windows = count_windows(corpus.name, len(corpus.train_tokens), context)
    wanted = cfg.repeated_fraction * cfg.horizon_tokens / context / cfg.copies
    documents = max(1, round(wanted / DOCUMENT_WINDOWS))
    if documents * DOCUMENT_WINDOWS > windows // 2:
        raise CorpusError(
            f"data.regime=redundant: {documents} repeated documents of {DOCUMENT_WINDOWS} windows are more than half of "
            f"the {windows} windows of corpus {corpus.name}: lower data.horizon_tokens ({cfg.horizon_tokens}) or raise "
            "data.copies"
        )
    order = np.argsort(draw(key(seed, "repeated documents"), np.arange(windows // DOCUMENT_WINDOWS)), kind="stable")
    repeated = (order[:documents, None] * DOCUMENT_WINDOWS + np.arange(DOCUMENT_WINDOWS)).reshape(-1)
    fresh = np.setdiff1d(np.arange(windows), repeated)
    return [Part("fresh", fresh * context), Part("repeated", np.sort(repeated) * context, cfg.edit_rate)]
