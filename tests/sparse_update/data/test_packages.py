"""Text of packages: reading .deb files, the split, near copies, the filters, the list, and what a run sees of kinds."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.packages import deb, listing
from sparse_update.data.packages.building import RECORD, TEXT, build, build_from
from sparse_update.data.packages.listing import Listing, Package
from sparse_update.data.packages.prose import is_compressible, is_english, is_prose, kind_of, near_copies
from sparse_update.data.packages.reading import read_packages
from sparse_update.data.records import CorpusError, Document
from sparse_update.data.regimes import make_stream
from sparse_update.data.stream import WindowStream

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo")


def prose(seed: int, sentences: int = 60) -> bytes:
    """English sentences with function words, different for each seed."""
    rng = np.random.default_rng(seed)
    nouns = ["".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=4)) for _ in range(5 * sentences)]
    lines = [
        "The {} of the {} is a {} and it is for the {} in the {}, as you will.".format(*nouns[5 * i : 5 * i + 5])
        for i in range(sentences)
    ]
    return "\n".join(lines).encode()


def archive(files: dict[str, bytes]) -> bytes:
    """A .deb by hand: an ar archive of three members."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as out:
        for name, text in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(text)
            out.addfile(member, io.BytesIO(text))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"x"), ("data.tar.xz", tar.getvalue())]
    made = deb.MAGIC
    for name, data in parts:
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return made


def documents() -> list[Document]:
    texts = [Document(f"p{i % 3}/usr/share/doc/text-{i}.txt", prose(i)) for i in range(30)]
    noise = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    repeated = b"one more time\n" * 90
    return [
        *texts,
        Document("p1/usr/share/x.bin", noise),
        Document("p1/usr/share/table", b"aaaa 0\n" * 900),
        Document("p2/usr/share/doc/copy.txt", repeated),
        Document("p2/usr/share/doc/copy2.txt", repeated),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_from(documents(), tmp_path / "text", "", {"p0": "1"})
    return tmp_path / "text"


def test_a_package_reads_as_its_files_and_compressed_ones_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(
        archive({"usr/share/doc/a": b"abc", "usr/share/man/man1/a.1.gz": gzip.compress(b"page"), "empty": b""})
    )
    assert list(deb.documents_of(path)) == [
        Document("usr/share/doc/a", b"abc"),
        Document("usr/share/man/man1/a.1", b"page"),
    ]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
def test_a_package_of_dpkg_deb_reads_the_same(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b>\nDescription: a\n"
    )
    (root / "usr").mkdir()
    (root / "usr" / "file").write_bytes(b"text\0more")
    (root / "usr" / "link").symlink_to("/etc/passwd")
    subprocess.run(
        ["dpkg-deb", "-Zxz", "--root-owner-group", "-b", root, tmp_path / "a.deb"], check=True, capture_output=True
    )
    assert list(deb.documents_of(tmp_path / "a.deb")) == [Document("usr/file", b"text\0more")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw[:-30], "cut short"),
        (lambda raw: b"PK" + raw, "no Debian package"),
        (lambda raw: raw.replace(b"data.tar.xz", b"data.tar.br"), "no member data.tar"),
        (lambda raw: raw[:300] + bytes(40) + raw[340:], "damaged"),
    ],
)
def test_a_damaged_package_is_refused(tmp_path: Path, change, said: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.deb"
    path.write_bytes(change(archive({"a": bytes(range(256)) * 8})))
    with pytest.raises(CorpusError, match=said):
        list(deb.documents_of(path))


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb, "LARGEST_BYTES", 1000)
    path = tmp_path / "a.deb"
    path.write_bytes(archive({name: gzip.compress(b"a" * 5000) if name.endswith("gz") else b"a" * 5000}))
    with pytest.raises(CorpusError, match="more than"):
        list(deb.documents_of(path))


def test_a_long_name_is_not_read_further_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GNU tar's header of a long name states any size, and zeros compress to nothing."""
    monkeypatch.setattr(deb, "LARGEST_BYTES", 20_000)
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**20
    packed = lzma.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(header.size))
    member = b"data.tar.xz".ljust(48) + str(len(packed)).encode().ljust(10) + b"`\n"
    path = tmp_path / "a.deb"
    path.write_bytes(deb.MAGIC + member + packed)
    with pytest.raises(CorpusError, match="unpacks to more than"):
        list(deb.documents_of(path))


@pytest.mark.parametrize("name", ["-oDir::Bin::Methods=x", "../a", "a b", "a/b", ""])
def test_a_name_that_apt_would_take_for_an_option_or_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    entry = {"name": name, "version": "1", "architecture": "all", "size_bytes": 1, "sha256": "0" * 64}
    (tmp_path / "list.json").write_text(json.dumps({"packages": [entry]}))
    with pytest.raises(CorpusError, match="none of a Debian package"):
        listing.read_listing(tmp_path / "list.json")


@pytest.mark.parametrize("size", [-1, 10**400, 1.5, "x", None, float("inf")])
def test_a_record_whose_sizes_are_not_the_texts_is_refused(folder: Path, size: object) -> None:
    record = json.loads((folder / RECORD).read_text())
    record["training"][0][1] = size
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(CorpusError):
        read_packages(folder, {})


def test_a_deep_or_odd_record_is_refused(folder: Path) -> None:
    for text in ("[" * 100_000, "[]", "{}", "7", '{"form": 1}'):
        (folder / RECORD).write_text(text)
        with pytest.raises(CorpusError):
            read_packages(folder, {})


def test_rules_tell_prose_from_the_rest() -> None:
    other = " ".join(["der", "Fluss", "und", "das", "Haus", "am", "Markt"] * 60).encode()
    noise = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    page = b"<html>" + b"".join(b"<b class='x'>%s</b>" % word for word in prose(1).split()) + b"</html>"
    assert [is_prose(t) for t in (prose(1), other, noise, page, prose(1, 5))] == [True, False, False, False, False]
    assert [is_english(t) for t in (prose(1), other, noise)] == [True, False, False]
    assert [is_compressible(t) for t in (b"%s" % other, noise, b"0 0 0\n" * 500)] == [False, False, False]
    kinds = {
        "usr/share/man/man1/a.1": "manual",
        "usr/share/man/de/man1/a.1": "translation",
        "usr/share/locale/de/a.mo": "translation",
        "usr/share/doc/a/copyright": "licence",
        "usr/share/doc/a/changelog": "changelog",
        "usr/share/a/t.xml": "data",
    }
    assert {name: kind_of(Document(name, b"a")) for name in kinds} == kinds
    assert kind_of(Document("usr/share/doc/a/b.png", b"\0\1")) == "blob"


def test_near_copies_are_found_through_markup_and_boilerplate_is_none() -> None:
    judged = [Document("a/judged", prose(1) + b" This is the licence that all of the documents here carry and repeat.")]
    page = b"<p>" + prose(1).replace(b"\n", b"</p>\n<p>") + b"</p>"
    part = prose(1)[: len(prose(1)) // 3] + prose(3, 300)
    licence = b"This is the licence that all of the documents here carry and repeat."
    training = [Document("b/page", page), Document("b/part", part), Document("c/new", prose(2))]
    training += [Document(f"c/{i}", licence) for i in range(10)]
    assert set(near_copies(judged, training)) == {"b/page", "b/part"}


def test_a_folder_reads_as_it_was_built_and_nothing_judged_is_trained_on(folder: Path) -> None:
    training, judged = read_packages(folder, {})
    given = {document.name: document.text for document in documents()}
    assert all(given[d.name] == d.text for d in (*training, *judged))
    assert judged
    assert not {d.name for d in training} & {d.name for d in judged}
    assert all(is_prose(d.text) for d in judged)
    assert len(training) + len(judged) == len(given)  # none of these is near another
    names = {
        keep: {d.name for d in read_packages(folder, {"keep": keep})[0]}
        for keep in ("exact", "near", "english", "compression")
    }
    whole = {d.name for d in training}
    assert whole - names["exact"] == {"p2/usr/share/doc/copy2.txt"}
    assert "p1/usr/share/x.bin" not in names["english"] | names["compression"]
    assert "p1/usr/share/table" not in names["english"] | names["compression"]
    assert all({d.name for d in training if is_prose(d.text)} <= names[keep] for keep in ("exact", "english"))


def test_a_changed_folder_and_unknown_options_are_refused(folder: Path) -> None:
    with pytest.raises(CorpusError, match="keep, one of all"):
        read_packages(folder, {"keep": "best"})
    text = bytearray((folder / TEXT).read_bytes())
    text[0] ^= 1
    (folder / TEXT).write_bytes(text)
    with pytest.raises(CorpusError, match="was changed"):
        read_packages(folder, {})
    (folder / RECORD).write_text(json.dumps({"form": 1, "training": 3}))
    with pytest.raises(CorpusError, match="holds no text of packages"):
        read_packages(folder, {})
    with pytest.raises(ValueError, match=r"needs data\.path"):
        DataConfig(name="packages")


def test_packages_must_be_the_listed_ones(tmp_path: Path) -> None:
    raw = archive({f"usr/share/doc/t{i}": prose(i) for i in range(12)})
    package = Package("a", "1:2", "all", len(raw), hashlib.sha256(raw).hexdigest())
    path = tmp_path / "a_1%3a2_all.deb"
    with pytest.raises(CorpusError, match="apt-get download a=1:2"):
        build(Listing((package,)), tmp_path, tmp_path / "out")
    path.write_bytes(raw)
    made = build(Listing((package,)), tmp_path, tmp_path / "out")
    assert made["packages"] == {"a": "1:2"}
    assert made["text_sha256"] == hashlib.sha256((tmp_path / "out" / TEXT).read_bytes()).hexdigest()
    with pytest.raises(CorpusError, match="their text has sha256"):
        build(Listing((package,), "0" * 64), tmp_path, tmp_path / "out")
    path.write_bytes(raw[:-1] + b"x")
    with pytest.raises(CorpusError, match="has sha256"):
        build(Listing((package,)), tmp_path, tmp_path / "out")


def test_the_shipped_list_is_whole_and_says_what_to_do_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = listing.read_listing()
    assert len(shipped.packages) == 24
    assert len(shipped.text_sha256) == 64
    monkeypatch.setattr(listing.shutil, "which", lambda name: None)
    with pytest.raises(CorpusError, match=r"no apt-get here.*apt-get download apt-doc=2\.6\.2"):
        listing.fetch(shipped, tmp_path)
    (tmp_path / "bad.json").write_text('{"packages": [{"name": "a"}]}')
    with pytest.raises(CorpusError, match="no list of packages"):
        listing.read_listing(tmp_path / "bad.json")


def test_a_stream_tells_the_kind_of_each_window_and_shows_the_same_windows(folder: Path) -> None:
    cfg = DataConfig(name="packages", path=str(folder))
    corpus = load_corpus(cfg)
    stream, plain = make_stream(corpus, cfg, 64, 3), WindowStream(corpus, 64, 3)
    ours, theirs = stream.take(200), plain.take(200)
    assert (ours.tokens == theirs.tokens).all()
    assert (ours.window == theirs.window).all()
    assert ours.document is not None
    kinds = [stream.source_names[i] for i in ours.source.tolist()]
    assert kinds == [corpus.train_kinds[i] for i in ours.document.tolist()]
    assert set(kinds) == {"blob", "data", "documentation"}
    weighed = make_stream(corpus, DataConfig(name="packages", path=str(folder), source_weights={"blob": 0.0}), 64, 3)
    assert "blob" not in {weighed.source_names[i] for i in weighed.take(200).source.tolist()}
