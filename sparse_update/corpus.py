"""Text -> tokens of two splits, training and held out; and the settings that say which text.

Reading and splitting are in `sources.py`, tokenizers in `tokens.py`, the order in which training sees text in
`stream.py` (its names are found here too).

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparse_update.sources import CorpusError, Document, files, sha256_of, shakespeare, split, stdlib
from sparse_update.stream import MAX_GARBAGE, SOURCES, Batch, WindowStream, cut_windows
from sparse_update.tokens import MAX_VOCAB, BpeTokenizer, ByteTokenizer, Tokenizer, TokenizerError

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

NAMES = ("shakespeare", "stdlib", "files")
SPELLINGS = ("modern", "folio", "both")


@dataclass
class DataConfig:
    """Which text, how it is cut, and how much of the stream is spoiled on purpose. Checked on construction."""

    name: str = "shakespeare"
    """shakespeare, stdlib or files"""
    path: str | None = None
    """files: one file, a folder (read recursively) or a glob"""
    spelling: str = "modern"
    """shakespeare: modern, folio (First Folio) or both"""
    tokenizer: str = "bytes"
    """bytes (256 tokens) or bpe (trained on the training documents)"""
    vocab_size: int = 256
    """bpe: tokens to learn, for instance 2048"""
    holdout_fraction: float = 0.1
    """stdlib, files: share of documents held out, chosen by a hash of the name"""
    garbage_fraction: float = 0.0
    """share of stream positions that hold garbage in place of text, for instance 0.3"""

    def __post_init__(self) -> None:
        for key, known in (("name", NAMES), ("spelling", SPELLINGS), ("tokenizer", ("bytes", "bpe"))):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"data.{key}={value!r} is not known; choose one of {', '.join(known)}")
        if self.name == "files" and not self.path:
            raise ValueError("data.name=files needs data.path: a file, a folder or a glob, e.g. data.path='notes/*.txt'")
        if self.name != "files" and self.path:
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


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of both splits. `*_tokens` uint16 (tokens,), read-only; document i is `[offsets[i], offsets[i + 1])`."""

    name: str
    train_tokens: np.ndarray
    train_offsets: np.ndarray  # int64 (documents + 1,)
    train_names: tuple[str, ...]
    val_tokens: np.ndarray
    val_offsets: np.ndarray
    val_names: tuple[str, ...]
    vocab_size: int
    train_bytes: int
    val_bytes: int
    sha256: str  # of all documents' text, training then held out, each in order of its name
    tokenizer: Tokenizer

    def count_bytes(self, tokens: torch.Tensor | np.ndarray) -> int:
        """Bytes of text behind `tokens` (any shape): bits per byte = summed nats / ln 2 / this."""
        return int(self.tokenizer.token_bytes[np.asarray(tokens)].sum(dtype=np.int64))


def load_corpus(cfg: DataConfig) -> Corpus:
    """Read, split, tokenise. Raises `CorpusError` when text is missing, corrupt, not text, or not enough to split."""
    if cfg.name == "shakespeare":
        train, val = shakespeare(cfg.spelling)
    elif cfg.name == "stdlib":
        train, val = split(stdlib(), cfg.holdout_fraction)
    else:
        train, val = split(files(str(cfg.path)), cfg.holdout_fraction)
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
        name=cfg.name if cfg.name != "shakespeare" else f"shakespeare/{cfg.spelling}",
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
    )


def val_windows(corpus: Corpus, context: int, max_tokens: int | None = None) -> torch.Tensor:
    """Held-out text as int64 (N, context + 1), always the same: columns `:-1` are inputs, `1:` the targets.

    Windows lie `context` apart, so every token is a target once (except the first, and those of an incomplete window).
    `max_tokens` bounds the targets, N * context; the windows kept are spread evenly over all held-out works.
    """
    windows = (len(corpus.val_tokens) - 1) // context
    if windows < 1:
        raise CorpusError(
            f"corpus {corpus.name}: {len(corpus.val_tokens)} held-out tokens are less than a window of {context + 1}; "
            "lower the context or give more text"
        )
    keep = windows if max_tokens is None else min(windows, max_tokens // context)
    if keep < 1:
        raise ValueError(f"max_tokens={max_tokens} is less than one window of {context} targets")
    index = (2 * np.arange(keep, dtype=np.int64) + 1) * windows // (2 * keep)
    return torch.from_numpy(cut_windows(corpus.val_tokens, index, context))


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
