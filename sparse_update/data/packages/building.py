"""The packages as one folder: their text in one file, and a record of every document. Made once, read by `reading`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_update.data.dedup import distinct_documents
from sparse_update.data.packages.deb import documents_of
from sparse_update.data.packages.listing import Listing, check
from sparse_update.data.packages.prose import is_compressible, is_english, is_prose, kind_of, near_copies
from sparse_update.data.records import CorpusError, Document
from sparse_update.data.splitting import held_out_names, sha256_of

TEXT, RECORD = "text.bin", "documents.json"
FORM = 1
HELD_OUT = 0.2
"""Share of the prose documents that is judged, by a hash of their names."""
FILTERS = ("exact", "near", "english", "compression")
"""What `data.options.keep` can ask for beside "all"."""


def build(listing: Listing, debs: Path, folder: Path) -> dict[str, Any]:
    """Check, unpack, split and filter the packages in `debs`; write `folder` and return its record.

    A filter's cost is stated as seconds of this process's CPU time for all the training text, because nothing of it is on
    the clock of a run. Raises `CorpusError` for packages that are missing or not the listed ones, for no prose, and where
    the text is not the one that the list names.
    """
    documents = []
    for package, path in zip(listing.packages, check(listing, debs), strict=True):
        documents += [Document(f"{package.name}/{d.name}", d.text) for d in documents_of(path)]
    return build_from(documents, folder, listing.text_sha256, {p.name: p.version for p in listing.packages})


def build_from(documents: Sequence[Document], folder: Path, expected: str, versions: dict[str, str]) -> dict[str, Any]:
    """As `build`, from documents named PACKAGE/PATH; `expected`: sha256 of the text, or ""."""
    prose = [document for document in documents if is_prose(document.text)]
    if len(prose) < 2:
        raise CorpusError(f"{len(prose)} of {len(documents)} documents are prose; at least 2 are needed to judge by one")
    held = held_out_names([document.name for document in prose], HELD_OUT)
    judged = [document for document in documents if document.name in held]
    near = near_copies(judged, [document for document in documents if document.name not in held])
    training = [document for document in documents if document.name not in held and document.name not in near]
    kept, cost = filtered(training, judged)
    text_sha256 = sha256_of(document.text for document in (*training, *judged))
    if expected and text_sha256 != expected:
        raise CorpusError(
            f"the packages are the listed ones, but their text has sha256 {text_sha256}, listed is {expected}: this "
            "version reads them otherwise than the one that wrote the list"
        )
    sizes: dict[str, Counter[str]] = {"training": Counter(), "judged": Counter(), "taken out": Counter()}
    for side, part in (("training", training), ("judged", judged)):
        for document in part:
            sizes[side][kind_of(document)] += len(document.text)
    for document in documents:
        if document.name in near:
            sizes["taken out"][kind_of(document)] += len(document.text)
    record = {
        "form": FORM,
        "text_sha256": text_sha256,
        "packages": versions,
        "bytes": {side: dict(count) for side, count in sizes.items()},
        "filter_cpu_s": cost,
        "filter_bytes": {name: sum(len(d.text) for d in training if d.name in names) for name, names in kept.items()},
        "prose_documents": len(prose),
        "near_copies": near,
        "training": [
            [d.name, len(d.text), kind_of(d), [name for name, names in kept.items() if d.name in names]] for d in training
        ],
        "judged": [[d.name, len(d.text), kind_of(d), []] for d in judged],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TEXT).open("wb") as file:
        for document in (*training, *judged):
            file.write(document.text)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def filtered(training: Sequence[Document], judged: Sequence[Document]) -> tuple[dict[str, set[str]], dict[str, float]]:
    """(filter -> names that it keeps, filter -> CPU seconds)"""

    def distinct(method: str) -> Callable[[], list[Document]]:
        return lambda: distinct_documents(training, judged, method)

    ways: dict[str, Callable[[], list[Document]]] = {
        "exact": distinct("exact"),
        "near": distinct("near"),
        "english": lambda: [document for document in training if is_english(document.text)],
        "compression": lambda: [document for document in training if is_compressible(document.text)],
    }
    kept, cost = {}, {}
    for name in FILTERS:
        before = time.process_time()
        kept[name] = {document.name for document in ways[name]()}
        cost[name] = round(time.process_time() - before, 3)
    return kept, cost
