"""Debian packages as documents: every regular file of one, in memory; nothing is written and nothing is run.

A .deb file is an ar archive of three members, of which `data.tar.*` holds the files (deb(5)). Files that the package ships
compressed (.gz: manuals, changelogs) are decompressed, as a reader's tools do.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from hardware.text import short
from sparse_update.data.records import CorpusError, Document

MAGIC = b"!<arch>\n"
HEADER = 60
LARGEST_BYTES = 256 * 2**20
"""Of one package unpacked, and of one of its files decompressed: more is refused before it is read."""


def documents_of(path: Path) -> Iterator[Document]:
    """Every regular file that is not empty, named by its path on the machine, in the order of the archive.

    Raises `CorpusError` for a file that is no Debian package, is damaged, or unpacks to more than `LARGEST_BYTES`.
    """
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(_unpacked(path)), mode="r:") as archive:
            for member in archive:
                if not member.isfile() or not member.size:
                    continue
                total += member.size
                if total > LARGEST_BYTES:
                    raise CorpusError(f"{path} unpacks to more than {LARGEST_BYTES // 2**20} MiB; it is not read further")
                held = archive.extractfile(member)
                text = held.read() if held else b""
                name = member.name.removeprefix("./")
                if name.endswith(".gz"):
                    text, name = _decompressed(text, f"{path}: {name}"), name.removesuffix(".gz")
                    total += len(text)
                if text:
                    yield Document(name, text)
    except (tarfile.TarError, lzma.LZMAError, EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{path} is damaged ({short(str(error))}); fetch the package again") from error


def _unpacked(path: Path) -> bytes:
    """The member data.tar, decompressed within the limit: tarfile itself would read a long name of any size."""
    name, data = _data(path)
    with (gzip.open if name.endswith("gz") else lzma.open)(io.BytesIO(data)) as file:
        found = bytes(file.read(LARGEST_BYTES + 1))
    if len(found) > LARGEST_BYTES:
        raise CorpusError(f"{path} unpacks to more than {LARGEST_BYTES // 2**20} MiB; it is not read further")
    return found


def _data(path: Path) -> tuple[str, bytes]:
    """Name and bytes of the member data.tar.gz or data.tar.xz, as it lies in the archive."""
    raw = path.read_bytes()
    if not raw.startswith(MAGIC):
        raise CorpusError(f"{path} is no Debian package: it does not begin as an ar archive does")
    at, found = len(MAGIC), []
    while at + HEADER <= len(raw):
        name = raw[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = raw[at + 48 : at + 58].strip()
        if raw[at + 58 : at + 60] != b"`\n" or not size.isdigit() or at + HEADER + int(size) > len(raw):
            raise CorpusError(f"{path} is damaged: its member at byte {at} is cut short or has no header; fetch it again")
        if name in ("data.tar.gz", "data.tar.xz"):
            return name, raw[at + HEADER : at + HEADER + int(size)]
        found.append(name)
        at += HEADER + int(size) + int(size) % 2
    raise CorpusError(f"{path} has no member data.tar.gz or data.tar.xz, but {', '.join(found) or 'none'}")


def _decompressed(data: bytes, what: str) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        text = file.read(LARGEST_BYTES + 1)
    if len(text) > LARGEST_BYTES:
        raise CorpusError(f"{what} decompresses to more than {LARGEST_BYTES // 2**20} MiB; it is not read")
    return text
