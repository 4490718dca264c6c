"""Text -> tokens of two splits, training and held out; and the settings that say which text.

Reading and splitting are in `sources.py`, tokenizers in `tokens.py`, the order in which training sees text in
`stream.py` (its names are found here too).

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_update.data.dedup import METHODS, distinct_documents
from sparse_update.data.domains import DOMAINS, domain
from sparse_update.data.records import Batch, Corpus, CorpusError, Document, Span
from sparse_update.data.shards.reading import ShardedTokens, load_shards
from sparse_update.data.sources import known_sources, read_source
from sparse_update.data.splitting import sha256_of
from sparse_update.data.stream import MAX_GARBAGE, SOURCES, WindowStream
from sparse_update.data.tokens import MAX_VOCAB, BpeTokenizer, ByteTokenizer, Tokenizer, TokenizerError
from sparse_update.plugins import import_plugins

__all__ = [
    "SOURCES",
    "Batch",
    "Corpus",
    "CorpusError",
    "DataConfig",
    "Document",
    "WindowStream",
    "load_corpus",
    "val_windows",
]

REGIMES = ("plain", "redundant", "drift", "familiar", "adapt")
DEDUPS = ("off", *METHODS)
SHARDS = "shards"
SPELLINGS = ("modern", "folio", "both")
MAX_EDITS = 0.5


@dataclass
class DataConfig:
    """Which text, how it is cut, how the stream is mixed, and what is done to it on purpose. Checked on construction."""

    name: str = "shakespeare"
    """shakespeare, stdlib, pydoc, files, shards, packages, domains (those of `domains`), or one registered by name (hf)"""
    path: str | None = None
    """files: one file, a folder (read recursively) or a glob; shards, packages: a folder of `spikegate tokens build` or
    `packages`; hf: files that Hugging Face `datasets` reads"""
    spelling: str = "modern"
    """shakespeare: modern, folio (First Folio) or both"""
    options: dict[str, Any] = field(default_factory=dict)
    """settings of a registered source; hf: text_field, name_field, limit; packages: keep"""
    tokenizer: str = "bytes"
    """bytes (256 tokens) or bpe (trained on the training documents)"""
    vocab_size: int = 256
    """bpe: tokens to learn, for instance 2048"""
    holdout_fraction: float = 0.1
    """all but shakespeare: share of documents held out, chosen by a hash of the name"""
    train_tokens: int = 0
    """use only so many training tokens, evenly from all documents, so that a run sees several epochs; 0: all"""
    garbage_fraction: float = 0.0
    """regime plain: share of stream positions that hold garbage in place of text, for instance 0.3"""
    regime: str = "plain"
    """plain, redundant, drift (the domains one after the other), familiar (two domains mixed), adapt (the second alone)"""
    domains: list[str] = field(default_factory=list)
    """name=domains: modern, folio, docs, code, or files:PATH; drift: in this order; familiar, adapt: known, new"""
    known_fraction: float = 0.7
    """familiar: share of stream positions with known text"""
    horizon_tokens: int = 3_000_000
    """redundant, drift: length of stream that the regime is laid out for"""
    repeated_fraction: float = 0.5
    """redundant: share of stream positions that show one of the repeated documents once more"""
    copies: int = 20
    """redundant: how often each repeated document is shown in `horizon_tokens`"""
    edit_rate: float = 0.01
    """redundant: share of a repeat's tokens that is edited (at least one), so that no two are equal; 0: exact repeats"""
    dedup: str = "off"
    """off, exact (windows and documents whose hash was seen are left out) or near (those that nearly agree, too)"""
    source_weights: dict[str, float] = field(default_factory=dict)
    """share of a source's windows that is let through, by name of the source, for instance {known: 0.3}; others: all"""
    plugins: list[str] = field(default_factory=list)
    """modules imported before the settings are checked: they register sources of your own"""

    def __post_init__(self) -> None:
        import_plugins("data.plugins", self.plugins)
        for key, known in (
            ("name", ("domains", SHARDS, *known_sources())),
            ("spelling", SPELLINGS),
            ("tokenizer", ("bytes", "bpe")),
            ("regime", REGIMES),
            ("dedup", DEDUPS),
        ):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"data.{key}={value!r} is not known; choose one of {', '.join(sorted(known, key=_rank))}")
        if self.name == "files" and not self.path:
            raise ValueError("data.name=files needs data.path: a file, a folder or a glob, e.g. data.path='notes/*.txt'")
        if self.name == "hf" and not self.path:
            raise ValueError("data.name=hf needs data.path: json, parquet, arrow or text files, e.g. data.path='c4/*.json'")
        if self.name == "packages" and not self.path:
            raise ValueError("data.name=packages needs data.path: a folder that `spikegate tokens packages` made")
        if self.name in ("shakespeare", "stdlib", "pydoc", "domains") and self.path:
            raise ValueError(f"data.path={self.path!r} is used only by data.name=files, but data.name={self.name!r}")
        if self.name != "shakespeare" and self.spelling != "modern":
            raise ValueError(f"data.spelling={self.spelling!r} is used only by data.name=shakespeare")
        if self.tokenizer == "bytes" and self.vocab_size != 256:
            raise ValueError(f"data.vocab_size={self.vocab_size}: bytes are 256 tokens; for more, data.tokenizer=bpe")
        if self.tokenizer == "bpe" and not 256 < self.vocab_size <= MAX_VOCAB:
            raise ValueError(
                f"data.vocab_size={self.vocab_size}: bpe needs more than the 256 bytes and at most {MAX_VOCAB} tokens "
                "(they are kept in 16 bits), for instance 2048"
            )
        if not 0.0 < self.holdout_fraction < 1.0:
            raise ValueError(f"data.holdout_fraction={self.holdout_fraction} must lie between 0 and 1, both excluded")
        if not 0.0 <= self.garbage_fraction <= MAX_GARBAGE:
            raise ValueError(f"data.garbage_fraction={self.garbage_fraction} must lie in 0..{MAX_GARBAGE}")
        if self.train_tokens < 0:
            raise ValueError(f"data.train_tokens={self.train_tokens} must not be negative; 0 takes all")
        self._check_regime()
        self._check_shards()
        for source, weight in self.source_weights.items():
            if not 0.0 <= weight <= 1.0:
                raise ValueError(f"data.source_weights: {source}: {weight} must lie in 0..1, the share that is let through")

    def _check_shards(self) -> None:
        if self.name != SHARDS:
            return
        if not self.path:
            raise ValueError("data.name=shards needs data.path: a folder that `spikegate tokens build` made")
        fixed = {"regime": "plain", "garbage_fraction": 0.0, "dedup": "off", "train_tokens": 0, "tokenizer": "bytes"}
        for key, only in fixed.items():
            if getattr(self, key) != only:
                raise ValueError(
                    f"data.{key}={getattr(self, key)} and data.name=shards: shards are streamed as they are, with the "
                    "tokenizer and the held-out text that they were built with; leave it out"
                )

    def _check_regime(self) -> None:
        if self.garbage_fraction and self.regime != "plain":
            raise ValueError(f"data.garbage_fraction is of data.regime=plain, but data.regime={self.regime}")
        if (self.name == "domains") != bool(self.domains):
            raise ValueError(f"data.name=domains and data.domains go together; here {self.name} and {self.domains}")
        wanted = {"drift": "two or more", "familiar": "two, the known and the new,", "adapt": "two, the known and the new,"}
        if self.regime in wanted and (len(self.domains) < 2 or (self.regime != "drift" and len(self.domains) != 2)):
            raise ValueError(
                f"data.regime={self.regime} needs {wanted[self.regime]} domains, for instance data.name=domains "
                f"data.domains=[modern,code]; here {self.domains}"
            )
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"data.domains={self.domains}: name each domain once")
        for name in self.domains:
            if name not in DOMAINS and not name.startswith("files:"):
                raise ValueError(f"data.domains: {name!r} is not known; choose from {', '.join(DOMAINS)}, files:PATH")
        for key in ("known_fraction", "repeated_fraction"):
            if not 0.0 < getattr(self, key) < 1.0:
                raise ValueError(f"data.{key}={getattr(self, key)} must lie between 0 and 1, both excluded")
        if not 0.0 <= self.edit_rate <= MAX_EDITS:
            raise ValueError(f"data.edit_rate={self.edit_rate} must lie in 0..{MAX_EDITS}")
        if self.copies < 2 or self.horizon_tokens < 1:
            raise ValueError(
                f"data.copies={self.copies} and horizon_tokens={self.horizon_tokens}: at least 2, and positive"
            )


def load_corpus(cfg: DataConfig) -> Corpus:
    """Read, split, tokenise. Raises `CorpusError` when text is missing, corrupt, not text, or not enough to split."""
    if cfg.name == SHARDS:
        return load_shards(Path(str(cfg.path)).expanduser())
    parts = {name: domain(name, cfg.holdout_fraction) for name in cfg.domains} if cfg.domains else {"": read_source(cfg)}
    if cfg.dedup != "off":
        parts = {name: (distinct_documents(train, val, cfg.dedup), val) for name, (train, val) in parts.items()}
    if cfg.train_tokens:
        parts = {name: (_thinned(train, cfg.train_tokens), val) for name, (train, val) in parts.items()}
    train = [document for side, _ in parts.values() for document in side]
    val = [document for _, side in parts.values() for document in side]
    try:
        tokenizer: Tokenizer
        if cfg.tokenizer == "bpe":
            for document in (*train, *val):
                _require_utf8(document)
            tokenizer = BpeTokenizer.train([document.text for document in train], cfg.vocab_size)
        else:
            tokenizer = ByteTokenizer()
        train_tokens, train_offsets = _encode(tokenizer, train)
        val_tokens, val_offsets = _encode(tokenizer, val)
    except TokenizerError as error:
        raise CorpusError(f"corpus {cfg.name}: {error}") from error
    return Corpus(
        name=_corpus_name(cfg),
        train_tokens=train_tokens,
        train_offsets=train_offsets,
        train_names=tuple(document.name for document in train),
        val_tokens=val_tokens,
        val_offsets=val_offsets,
        val_names=tuple(document.name for document in val),
        vocab_size=tokenizer.vocab_size,
        train_bytes=sum(len(document.text) for document in train),
        val_bytes=sum(len(document.text) for document in val),
        sha256=sha256_of(document.text for document in (*train, *val)),
        tokenizer=tokenizer,
        spans=_spans(parts, train_offsets, val_offsets) if cfg.domains else {},
        train_kinds=tuple(d.kind for d in train) if any(d.kind for d in train) else (),
        known=cfg.domains[0] if cfg.regime in ("familiar", "adapt") else "",
    )


def _corpus_name(cfg: DataConfig) -> str:
    if cfg.domains:
        return "+".join(cfg.domains)
    return cfg.name if cfg.name != "shakespeare" else f"shakespeare/{cfg.spelling}"


def _spans(parts: Mapping[str, Any], train_offsets: np.ndarray, val_offsets: np.ndarray) -> dict[str, Span]:
    spans, i, j = {}, 0, 0
    for name, (train, val) in parts.items():
        ends = i + len(train), j + len(val)
        spans[name] = Span(
            (int(train_offsets[i]), int(train_offsets[ends[0]])), (int(val_offsets[j]), int(val_offsets[ends[1]]))
        )
        i, j = ends
    return spans


def _thinned(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The same share of every document, from its start, `tokens` bytes in all. Bytes stand for tokens: bpe gives fewer."""
    share = min(1.0, tokens / max(1, sum(len(document.text) for document in documents)))
    cut = [Document(document.name, _head(document.text, round(len(document.text) * share))) for document in documents]
    return [document for document in cut if document.text]


def _head(text: bytes, length: int) -> bytes:
    """The first `length` bytes, less the start of a UTF-8 character that would be cut."""
    while 0 < length < len(text) and text[length] & 0xC0 == 0x80:
        length -= 1
    return text[:length]


def _rank(name: str) -> tuple[int, str]:
    order = ("shakespeare", "stdlib", "files", "plain", "modern", "bytes", "off")
    return (order.index(name) if name in order else len(order), name)


def val_windows(corpus: Corpus, context: int, max_tokens: int | None = None, domain: str | None = None) -> torch.Tensor:
    """Held-out text as int64 (N, context + 1), always the same: columns `:-1` are inputs, `1:` the targets.

    Windows lie `context` apart, so every token is a target once (except the first, and those of an incomplete window).
    `max_tokens` bounds the targets, N * context; the windows kept are spread evenly over all held-out works, of `domain`
    alone where one is named.
    """
    return cut_at(corpus.val_tokens, val_starts(corpus, context, max_tokens, domain), context)


def val_starts(corpus: Corpus, context: int, max_tokens: int | None = None, domain: str | None = None) -> np.ndarray:
    """Where the windows of `val_windows` begin in the held-out text, int64 (N,)."""
    start, stop = corpus.spans[domain].val if domain else (0, len(corpus.val_tokens))
    windows = (stop - start - 1) // context
    if windows < 1:
        where = f"corpus {corpus.name}" + (f", {domain}" if domain else "")
        raise CorpusError(
            f"{where}: {stop - start} held-out tokens are less than a window of {context + 1}; lower the context or give "
            "more text"
        )
    keep = windows if max_tokens is None else min(windows, max_tokens // context)
    if keep < 1:
        raise ValueError(f"max_tokens={max_tokens} is less than one window of {context} targets")
    return start + context * ((2 * np.arange(keep, dtype=np.int64) + 1) * windows // (2 * keep))


def cut_at(tokens: np.ndarray | ShardedTokens, starts: np.ndarray, context: int) -> torch.Tensor:
    """Windows of `tokens` that begin at `starts` (N,): int64 (N, context + 1)."""
    if isinstance(tokens, ShardedTokens):
        return torch.from_numpy(tokens.windows(starts, context + 1).astype(np.int64))
    view = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)
    return torch.from_numpy(view[starts].astype(np.int64))


def _require_utf8(document: Document) -> None:
    try:
        document.text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{document.name}: byte {error.start} (0x{document.text[error.start]:02x}) is not UTF-8, which bpe needs; "
            "convert the file, or use data.tokenizer=bytes, which takes any encoding"
        ) from error


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    parts = tokenizer.encode([document.text for document in documents])
    tokens = np.concatenate(parts)
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64)
    tokens.setflags(write=False)
    offsets.setflags(write=False)
    return tokens, offsets
