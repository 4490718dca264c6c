"""Text from Hugging Face `datasets`: documents in memory for a corpus, or a stream for text that does not fit.

Nothing is downloaded unless a name of the hub is given: paths are read from the disk. The library loads on first use.

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_update.data.records import Batch, CorpusError, Document
from sparse_update.data.tokens import Tokenizer, TokenizerError

INSTALL_HUB = "pip install 'spikegate[hub]'"
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}


def load(path: str, streaming: bool = False) -> Any:
    """A `datasets` Dataset (IterableDataset with `streaming`) of local json, jsonl, parquet, arrow, csv or text files.

    `path` is a file, a folder or a glob; all files are of one kind; a line of a text file is a row, as in `datasets`.
    Raises CorpusError where there is no such file, or several kinds.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        files = [p for p in found.rglob("*") if p.suffix in KINDS and not p.name.startswith(".")]
    else:
        files = [found] if found.is_file() else [Path(p) for p in glob.glob(str(found), recursive=True)]
    files = sorted(p for p in files if p.is_file())
    if not files:
        raise CorpusError(
            f"data.path={path!r} names no file with one of the endings {', '.join(KINDS)} (looked from {Path.cwd()})"
        )
    kinds = {KINDS.get(p.suffix) for p in files}
    if len(kinds) > 1 or None in kinds:
        raise CorpusError(
            f"data.path={path!r} names files of {', '.join(sorted({p.suffix for p in files}))}: one kind of "
            f"{', '.join(KINDS)} at "
            "a time, for instance data.path='folder/*.jsonl'"
        )
    library = _datasets()
    try:
        return library.load_dataset(
            str(kinds.pop()), data_files=[str(p) for p in files], split="train", streaming=streaming
        )
    except library.exceptions.DatasetGenerationError as error:
        raise CorpusError(f"data.path={path!r} cannot be read: {error.__cause__ or error}") from error


def documents(path: str, text_field: str = "text", name_field: str = "", limit: int = 0) -> list[Document]:
    """All rows of local files as documents, at most `limit` of them. See `load` and `documents_of`."""
    return documents_of(load(path, streaming=True), text_field, name_field, limit)


def documents_of(
    dataset: Iterable[Mapping[str, Any]], text_field: str = "text", name_field: str = "", limit: int = 0
) -> list[Document]:
    """Rows of a dataset as documents; empty ones are left out.

    A document is named by `name_field`, or by a hash of its text: so its side of the split does not change with its place.
    Raises CorpusError where a row lacks the field or all are empty.
    """
    found: dict[str, Document] = {}
    for document in _documents(dataset, text_field, name_field):
        if not document.text:
            continue
        name, copies = document.name, 1
        while name in found:
            copies += 1
            name = f"{document.name}#{copies}"
        found[name] = Document(name, document.text)
        if len(found) == limit:
            break
    if not found:
        raise CorpusError(f"the dataset has no text in its field {text_field!r}")
    return list(found.values())


def _documents(dataset: Iterable[Mapping[str, Any]], text_field: str, name_field: str) -> Iterator[Document]:
    for number, row in enumerate(dataset):
        for field in (text_field, name_field):
            if field and field not in row:
                raise CorpusError(f"row {number} of the dataset has {', '.join(map(str, row))}, no field {field!r}")
        text = row[text_field]
        if not isinstance(text, (str, type(None))):
            raise CorpusError(f"row {number} of the dataset: {text_field!r} is a {type(text).__name__}, text is needed")
        data = (text or "").encode()
        yield Document(str(row[name_field]) if name_field else hashlib.sha256(data).hexdigest()[:24], data)


class HubStream:
    """Windows of context + 1 tokens out of a dataset that is read as it comes, held out by document, resumable.

    Documents follow one another without separators, as in a corpus. Whether one is held out depends on its name alone (or
    the hash of its text), so both sides read the same dataset and never share a document.

    Args:
        dataset: a `datasets` Dataset or IterableDataset, or any iterable of rows that starts anew each time.
        tokenizer: of the run; `encode` of one document at a time.
        context: T.
        side: "train" or "val".
        holdout_fraction: share of documents held out.

    Raises CorpusError when an epoch of the dataset gives less than a window.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Tokenizer,
        context: int,
        side: str = "train",
        holdout_fraction: float = 0.1,
        text_field: str = "text",
        name_field: str = "",
    ) -> None:
        if side not in ("train", "val"):
            raise ValueError(f"side = {side!r}: train or val")
        if context < 1:
            raise ValueError(f"context={context} must be at least 1 token")
        if not 0.0 < holdout_fraction < 1.0:
            raise ValueError(f"data.holdout_fraction={holdout_fraction} must lie between 0 and 1, both excluded")
        self.dataset, self.tokenizer, self.context, self.side = dataset, tokenizer, context, side
        self.holdout_fraction, self.text_field, self.name_field = holdout_fraction, text_field, name_field
        self.epoch = self.rows = self.position = 0
        """epochs done, rows of this epoch read, windows given"""
        self._tail = np.zeros(0, dtype=np.uint16)
        self._reader: Iterator[Document] | None = None

    def take(self, n: int) -> Batch:
        """The next `n` windows; starts the dataset anew where it ends."""
        needed = n * self.context + 1
        parts, have, started = [self._tail], len(self._tail), self.epoch
        while have < needed:
            if self._reader is None:
                self._reader = self._open(self.rows)
            document = next(self._reader, None)
            if document is None:
                if self.rows == 0 or self.epoch > started:
                    raise CorpusError(
                        f"a batch of {n} windows of {self.context} tokens: one epoch of the dataset gives {have} tokens "
                        "on the "
                        f"side {self.side!r}; choose a smaller batch, a shorter context, or more text"
                    )
                self.epoch, self.rows, self._reader = self.epoch + 1, 0, None
                continue
            self.rows += 1
            if document.text and self._mine(document.name):
                try:
                    parts.append(self.tokenizer.encode([document.text])[0])
                except TokenizerError as error:
                    raise CorpusError(f"row {self.rows - 1} of the dataset: {error}") from error
                have += len(parts[-1])
        tokens = np.concatenate(parts)
        index = np.arange(n, dtype=np.int64)
        view = np.lib.stride_tricks.sliding_window_view(tokens, self.context + 1)
        windows = torch.from_numpy(view[index * self.context].astype(np.int64))
        self._tail = tokens[n * self.context :].copy()
        number = torch.from_numpy(self.position + index)
        self.position += n
        return Batch(windows, torch.zeros(n, dtype=torch.int8), number)

    def _mine(self, name: str) -> bool:
        unit = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2.0**48
        return (unit < self.holdout_fraction) == (self.side == "val")

    def _open(self, skip: int) -> Iterator[Document]:
        data = self.dataset
        if skip and hasattr(data, "__len__") and skip >= len(data):
            return iter(())
        if skip:
            data = data.skip(skip) if hasattr(data, "skip") else _skipped(data, skip)
        return _documents(data, self.text_field, self.name_field)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; the tokens that were read and not given are in it."""
        return {
            "epoch": self.epoch,
            "rows": self.rows,
            "position": self.position,
            "tail": torch.from_numpy(self._tail.astype(np.int64)),
            "context": self.context,
            "side": self.side,
            "holdout_fraction": self.holdout_fraction,
            "vocab_size": self.tokenizer.vocab_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly there: rows that were read are skipped. Raises ValueError for the state of another stream."""
        for key, here in self.state_dict().items():
            if key in ("context", "side", "holdout_fraction", "vocab_size") and state.get(key) != here:
                raise ValueError(
                    f"this state belongs to another stream: {key} is {state.get(key)!r} there and {here!r} here; resume "
                    "with the "
                    "settings and the text of the run that wrote it"
                )
        self.epoch, self.rows, self.position = int(state["epoch"]), int(state["rows"]), int(state["position"])
        self._tail = state["tail"].numpy().astype(np.uint16)
        self._reader = None


def _skipped(rows: Iterable[Any], count: int) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if number >= count:
            yield row


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"data.name=hf needs the package `datasets`: {INSTALL_HUB}") from error
    return datasets
