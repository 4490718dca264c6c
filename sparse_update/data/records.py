"""What passes between the files of this room: documents, a corpus of tokens, a batch of windows.

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from sparse_update.data.tokens import Tokenizer


class CorpusError(ValueError):
    """A corpus that cannot be read or is too short; the message names it and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text that lies as a whole on one side of the split."""

    name: str
    text: bytes
    kind: str = ""
    """What kind of text it is, where its source says so; a run then tells what a gate kept of each."""


Split = tuple[list[Document], list[Document]]
"""(training, held out)."""


@dataclass(frozen=True)
class Span:
    """Where the text of one domain lies: tokens `[start, stop)` of the training text and of the held-out text."""

    train: tuple[int, int]
    val: tuple[int, int]


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
    spans: Mapping[str, Span] = field(default_factory=dict)  # by name of the domain, in order; empty for a single source
    train_kinds: tuple[str, ...] = ()  # of each training document; empty where the source names none
    known: str = ""  # the domain that a model has learnt already; of familiar and adapt

    def count_bytes(self, tokens: torch.Tensor | np.ndarray) -> int:
        """Bytes of text behind `tokens` (any shape): bits per byte = summed nats / ln 2 / this."""
        return int(self.tokenizer.token_bytes[np.asarray(tokens)].sum(dtype=np.int64))

    @cached_property
    def known_tokens(self) -> torch.Tensor | None:
        """Training text of the known domain, int64 (tokens,), for signals of novelty; None where there is none."""
        if not self.known:
            return None
        start, stop = self.spans[self.known].train
        return torch.from_numpy(self.train_tokens[start:stop].astype(np.int64))


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step sees. `tokens[:, :-1]` are inputs, `tokens[:, 1:]` targets."""

    tokens: torch.Tensor  # int64 (N, T + 1)
    source: torch.Tensor  # int8 (N,): index into the stream's `source_names`
    window: torch.Tensor  # int64 (N,): number of the training window whose tokens these are; -1 where source is random
    document: torch.Tensor | None = None
    """int64 (N,): number of the training document that the window begins in, -1 where source is random; None where a stream
    does not number its documents."""
