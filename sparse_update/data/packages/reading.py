"""The folder that `building` made as documents: `data.name=packages data.path=FOLDER`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardware.documents import read_json
from sparse_update.data.packages.building import FILTERS, FORM, RECORD, TEXT
from sparse_update.data.records import CorpusError, Document, Split
from sparse_update.data.splitting import sha256_of

AGAIN = "make it again: spikegate tokens packages DEBS FOLDER"


def read_packages(folder: Path, options: Mapping[str, Any]) -> Split:
    """(training, judged prose), as one of the filters leaves the training text: `options.keep`, by default all of it.

    Raises `CorpusError` for options that there are not, a folder that is not whole, and text that was changed.
    """
    unknown = sorted(set(options) - {"keep"})
    keep = options.get("keep", "all")
    if unknown or keep not in ("all", *FILTERS):
        raise CorpusError(f"data.options={dict(options)}: packages take keep, one of all, {', '.join(FILTERS)}")
    try:
        record = read_json(folder / RECORD, CorpusError)
        text = (folder / TEXT).read_bytes()
        if record["form"] != FORM:
            raise CorpusError(f"{folder}: form {record['form']}, this version reads {FORM}; {AGAIN}")
        sides = [
            [(str(n), int(size), str(kind), list(by)) for n, size, kind, by in record[s]] for s in ("training", "judged")
        ]
        expected = str(record["text_sha256"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{folder} holds no text of packages ({str(error)[:120]}); {AGAIN}") from error
    if (found := sha256_of([text])) != expected:
        raise CorpusError(f"{folder / TEXT} was changed: sha256 {found}, recorded is {expected}; {AGAIN}")
    lengths = [size for rows in sides for _, size, _, _ in rows]
    if min(lengths, default=0) < 0 or sum(lengths) != len(text):
        raise CorpusError(f"{folder / RECORD}: its documents are not those of the text's {len(text):,} bytes; {AGAIN}")
    at, split = 0, []
    for side, rows in zip(("training", "judged"), sides, strict=True):
        part = []
        for name, size, kind, by in rows:
            if side == "judged" or keep == "all" or keep in by:
                part.append(Document(name, text[at : at + size], kind))
            at += size
        split.append(part)
    if not split[0] or not split[1]:
        raise CorpusError(f"{folder}: keep={keep} leaves {len(split[0])} training and {len(split[1])} judged documents")
    return split[0], split[1]
