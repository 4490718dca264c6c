"""Which documents are held out, by a hash of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from sparse_update.data.records import CorpusError, Document


def split(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held out). A document's side depends on its name alone, so that adding others does not move it.

    Two documents or more: at least one on each side. A single document is cut: its tail, from the start of a line, is
    held out, and both names say so.
    """
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        cut = text.rfind(b"\n", 0, round(len(text) * (1.0 - fraction))) + 1 or round(len(text) * (1.0 - fraction))
        if not 0 < cut < len(text):
            raise CorpusError(f"{name}: {len(text)} bytes are too few to hold out a share of {fraction}")
        return [Document(f"{name}[:{cut}]", text[:cut])], [Document(f"{name}[{cut}:]", text[cut:])]
    held = held_out_names([document.name for document in documents], fraction)
    return [d for d in documents if d.name not in held], [d for d in documents if d.name in held]


def held_out_names(names: Sequence[str], fraction: float) -> set[str]:
    """Names, of two or more, that are held out: at least one, and not all."""
    place = {name: _unit_hash(name) for name in names}
    held = {name for name, u in place.items() if u < fraction}
    if not held:
        held = {min(place, key=place.__getitem__)}
    elif len(held) == len(place):
        held.discard(max(place, key=place.__getitem__))
    return held


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2.0**48


def sha256_of(texts: Iterable[bytes]) -> str:
    """Hex sha256 of the texts one after the other."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text)
    return digest.hexdigest()
