"""Which documents of the packages are prose, of which kind a document is, and which come too near to the judged prose.

Every rule is fixed and looks at one document, apart from the search for near copies, which looks at all of them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from sparse_update.data.records import Document

KINDS = ("documentation", "manual", "translation", "changelog", "licence", "data", "blob")
FUNCTION_WORDS = "the of and to a in is that for it as be with on by this are or from not can if an which you will at"
PROSE_WORDS, PROSE_FUNCTION, PROSE_PLAIN = 150, 0.25, 0.93
"""Prose: so many words at least, so large a share of them function words, so large a share of its characters plain."""
ENGLISH_WORDS, ENGLISH_FUNCTION = 20, 0.15
"""The language filter: so many words, so large a share of them English function words. (English prose has about 0.3.)"""
RATIO_BYTES, RATIO = 65536, (1.8, 4.5)
"""The compression filter: the bytes looked at, and the zlib ratios kept (English prose has between 2 and 3.5)."""
SHINGLE_WORDS = 8
BOILERPLATE_DOCUMENTS = 8
"""A shingle of the judged prose that stands in so many training documents, such as a licence's, tells of no copy: a book in
all its forms is fewer."""
OWN_SHARE, JUDGED_SHARE = 0.1, 0.2
"""Near copies: training documents of which so much stands in the judged prose, or that hold so much of one judged text."""

_WORD = re.compile(rb"[a-z']+")
_MARKUP = re.compile(rb"<[^<>]{0,400}>|\\f[A-Z]|\\-")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n.,;:'()-")
_NOT_PLAIN = bytes(sorted(set(range(256)) - _PLAIN))


def kind_of(document: Document) -> str:
    """One of `KINDS`, by the path, and for what no path tells by its bytes: a NUL byte or no UTF-8 makes a blob."""
    path = PurePosixPath(document.name)
    name, parts = path.name.lower(), path.parts
    after_man = parts[parts.index("man") + 1] if "man" in parts[:-1] else "man"
    if "locale" in parts or path.suffix in (".mo", ".po") or not after_man.startswith("man"):
        return "translation"
    if "man" in parts or "info" in parts:
        return "manual"
    if b"\0" in document.text or not _is_utf8(document.text):
        return "blob"
    if name.startswith(("changelog", "news")):
        return "changelog"
    if name in ("copyright", "copying", "license", "licence"):
        return "licence"
    return "documentation" if "doc" in parts else "data"


def is_prose(text: bytes) -> bool:
    """Whether it is English prose with little markup, by the shares above."""
    words, function = _words(text)
    if words < PROSE_WORDS or function < PROSE_FUNCTION or not _is_utf8(text):
        return False
    return len(text.translate(None, _NOT_PLAIN)) >= PROSE_PLAIN * len(text)


def is_english(text: bytes) -> bool:
    """The language filter: UTF-8 whose words are often enough English function words."""
    words, function = _words(text)
    return words >= ENGLISH_WORDS and function >= ENGLISH_FUNCTION and _is_utf8(text)


def is_compressible(text: bytes) -> bool:
    """The compression filter: neither noise, which does not compress, nor a table, which does so too well."""
    head = text[:RATIO_BYTES]
    return RATIO[0] <= len(head) / len(zlib.compress(head)) <= RATIO[1]


def near_copies(judged: Sequence[Document], training: Sequence[Document]) -> dict[str, float]:
    """Name of each training document that is a near copy -> the larger of the two shares by which it is.

    Markup is left out before words are compared, so that the HTML page of a judged text is found.
    """
    ids: dict[bytes, int] = {}
    owner, shingles = [], []
    for i, document in enumerate(judged):
        found = np.unique(_shingles(document.text, ids))
        shingles.append(found)
        owner.append(np.full(len(found), i))
    held, first = np.unique(np.concatenate(shingles), return_index=True)
    owned = np.concatenate(owner)[first]
    size = np.bincount(owned, minlength=len(judged))
    hits: list[tuple[np.ndarray, int]] = []
    documents = np.zeros(len(held), dtype=np.int64)
    for document in training:
        own = np.unique(_shingles(document.text, ids))
        at = np.searchsorted(held, own).clip(0, len(held) - 1)
        at = at[held[at] == own]
        documents[at] += 1
        hits.append((at, len(own)))
    telling = documents < BOILERPLATE_DOCUMENTS
    near = {}
    for document, (at, total) in zip(training, hits, strict=True):
        at = at[telling[at]]
        if not len(at):
            continue
        share = len(at) / total
        of_one = float((np.bincount(owned[at], minlength=len(judged)) / np.maximum(size, 1)).max())
        if share >= OWN_SHARE or of_one >= JUDGED_SHARE:
            near[document.name] = round(max(share, of_one), 4)
    return near


def _shingles(text: bytes, ids: dict[bytes, int]) -> np.ndarray:
    """uint64: a hash of each `SHINGLE_WORDS` words in a row; `ids` numbers the words and grows."""
    words = _WORD.findall(_MARKUP.sub(b" ", text).lower())
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, dtype=np.uint64)
    numbers = np.fromiter((ids.setdefault(word, len(ids) + 1) for word in words), dtype=np.uint64, count=len(words))
    factors = np.cumprod(np.full(SHINGLE_WORDS, 0x9E3779B97F4A7C15, dtype=np.uint64), dtype=np.uint64)
    mixed = (np.lib.stride_tricks.sliding_window_view(numbers, SHINGLE_WORDS) * factors).sum(axis=1, dtype=np.uint64)
    return mixed ^ (mixed >> np.uint64(29))


def _words(text: bytes) -> tuple[int, float]:
    words = _WORD.findall(text.lower())
    return len(words), sum(word in _FUNCTION for word in words) / max(1, len(words))


_FUNCTION = frozenset(FUNCTION_WORDS.encode().split())


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
