"""Token shards: the same tokens as the corpus in memory, an order that hangs on the seed alone, and damage by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.commands import tokens as command
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.records import CorpusError
from sparse_update.data.regimes import make_stream
from sparse_update.data.shards import building, form, reading
from sparse_update.data.shards.building import Recipe, build
from sparse_update.data.shards.reading import ShardedTokens, load_shards
from sparse_update.data.shards.stream import Permutation
from tests import mutations


def text(folder: Path, sizes: list[int], seed: int = 0, lines: bool = True) -> Path:
    """Files of words, some with letters of two bytes; the third one lies deeper."""
    rng = np.random.default_rng(seed)
    words = ["ein", "zwölf", "Straße", "und", "noch", "größer", "a", "the"]
    for number, size in enumerate(sizes):
        path = folder / ("inner/" if number == 2 else "") / f"t{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = ""
        while len(found.encode()) < size:
            found += str(rng.choice(words)) + ("\n" if lines and rng.random() < 0.1 else " ")
        path.write_bytes(found.encode()[:size].decode(errors="ignore").encode())
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 tokens and pieces of 300 bytes, so that small texts have many."""
    for module in (form, reading, building):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(building, "PIECE_BYTES", 300)


def config(path: Path, **more: Any) -> DataConfig:
    return DataConfig(name="shards", path=str(path), **more)


@pytest.mark.parametrize("sizes", [[3000, 10, 800, 5000, 1, 2200, 4000, 900], [20_000]])
@pytest.mark.parametrize("lines", [True, False])
def test_shards_hold_the_tokens_of_the_corpus_in_memory(
    sizes: list[int], lines: bool, tmp_path: Path, small_blocks: None
) -> None:
    source = text(tmp_path / "text", sizes, lines=lines)
    build(str(source), tmp_path / "shards", Recipe(shard_bytes=1500, holdout_fraction=0.3))
    ours = load_corpus(config(tmp_path / "shards"))
    theirs = load_corpus(DataConfig(name="files", path=str(source), holdout_fraction=0.3))
    assert len(list((tmp_path / "shards").glob("*.tokens"))) > 8
    for side in ("train", "val"):
        tokens, expected = getattr(ours, f"{side}_tokens"), getattr(theirs, f"{side}_tokens")
        assert len(tokens) == len(expected)
        np.testing.assert_array_equal(tokens[:], expected)
        np.testing.assert_array_equal(getattr(ours, f"{side}_offsets"), getattr(theirs, f"{side}_offsets"))
        assert getattr(ours, f"{side}_bytes") == getattr(theirs, f"{side}_bytes")
    assert ours.val_names == theirs.val_names
    np.testing.assert_array_equal(val_windows(ours, 16), val_windows(theirs, 16))


def test_bpe_shards_hold_the_tokens_of_the_corpus_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    source = text(tmp_path / "text", [900, 700, 1500, 1200])
    build(str(source), tmp_path / "shards", Recipe("bpe", 280, shard_bytes=1600))
    ours = load_corpus(config(tmp_path / "shards"))
    theirs = load_corpus(DataConfig(name="files", path=str(source), tokenizer="bpe", vocab_size=280))
    assert ours.vocab_size == 280
    np.testing.assert_array_equal(ours.train_tokens[:], theirs.train_tokens)
    np.testing.assert_array_equal(ours.val_tokens[:], theirs.val_tokens)


def test_a_cut_never_parts_a_character(tmp_path: Path, small_blocks: None) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "one.txt").write_text("ß" * 9000, encoding="utf-8")
    (tmp_path / "two.txt").write_text("öä" * 300, encoding="utf-8")
    made = build(str(tmp_path / "*.txt"), tmp_path / "shards", Recipe("bpe", 258, shard_bytes=1025))
    assert len(made.shards) > 8
    corpus = load_shards(tmp_path / "shards")
    both = [corpus.tokenizer.decode(side[:]).decode() for side in (corpus.train_tokens, corpus.val_tokens)]
    assert sorted(both, key=len) == ["öä" * 300, "ß" * 9000]


def test_shards_do_not_depend_on_the_processes_and_the_order_not_on_the_shards(tmp_path: Path) -> None:
    source = text(tmp_path / "text", [4000, 3000, 2500, 6000])
    one = build(str(source), tmp_path / "one", Recipe(shard_bytes=2000))
    two = build(str(source), tmp_path / "two", Recipe(shard_bytes=2000), processes=2)
    assert one == two
    for path in (tmp_path / "one").glob("*.tokens"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    build(str(source), tmp_path / "large", Recipe())
    streams = [make_stream(load_shards(tmp_path / name), config(tmp_path / name), 32, 7) for name in ("one", "large")]
    for _ in range(4):
        first, second = (stream.take(50) for stream in streams)
        assert first.tokens.equal(second.tokens)
        assert first.window.equal(second.window)
        assert first.document is not None
        assert second.document is not None
        assert first.document.equal(second.document)


def test_windows_of_an_epoch_are_each_shown_once_and_are_those_of_the_text(tmp_path: Path, small_blocks: None) -> None:
    source = text(tmp_path / "text", [4000, 3000, 2500])
    build(str(source), tmp_path / "shards", Recipe(shard_bytes=1024))
    corpus = load_shards(tmp_path / "shards")
    stream = make_stream(corpus, config(tmp_path / "shards"), 24, 3)
    whole = corpus.train_tokens[:].astype(np.int64)
    epochs = []
    for _ in range(2):
        batch = stream.take(stream.windows)
        assert sorted(batch.window.tolist()) == list(range(stream.windows))
        places = batch.window.numpy()[:, None] * 24 + np.arange(25)
        np.testing.assert_array_equal(batch.tokens.numpy(), whole[places])
        epochs.append(batch.window.tolist())
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    other = make_stream(corpus, config(tmp_path / "shards"), 24, 4).take(stream.windows)
    assert other.window.tolist() != epochs[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**31), st.integers(0, 3))
def test_the_order_is_a_permutation_and_any_place_of_it_stands_alone(size: int, seed: int, epoch: int) -> None:
    order = Permutation(seed, size)
    places = np.arange(size, dtype=np.int64) + epoch * size
    whole = order.at(places)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.random.default_rng(0).permutation(size)[:20]
    np.testing.assert_array_equal(Permutation(seed, size).at(places[some]), whole[some])


def test_the_order_looks_random() -> None:
    """Means of numbers, of neighbours' products and of fixed points against those of a random permutation."""
    size = 200_000
    found = Permutation(5, size).at(np.arange(size, dtype=np.int64)) / size - 0.5
    sigma = (1 / 12 / size) ** 0.5
    assert abs(found[: size // 2].mean()) < 4 * sigma
    assert abs((found[1:] * found[:-1]).mean()) < 4 / 12 / size**0.5
    assert abs((found * (np.arange(size) / size - 0.5)).mean()) < 4 / 12 / size**0.5
    assert (found == np.arange(size) / size - 0.5).sum() < 10


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    build(str(text(tmp_path / "text", [4000, 3000])), tmp_path / "shards", Recipe(shard_bytes=1500))
    corpus = load_shards(tmp_path / "shards")
    first = make_stream(corpus, config(tmp_path / "shards"), 16, 1)
    first.take(70)
    state = json.loads(json.dumps(first.state_dict()))
    again = make_stream(load_shards(tmp_path / "shards"), config(tmp_path / "shards"), 16, 1)
    again.load_state_dict(state)
    ahead = [first.take(9) for _ in range(30)]
    assert all(batch.tokens.equal(again.take(9).tokens) for batch in ahead)
    build(str(text(tmp_path / "other", [4000, 3000], seed=1)), tmp_path / "shards2", Recipe(shard_bytes=1500))
    wrong = make_stream(load_shards(tmp_path / "shards2"), config(tmp_path / "shards2"), 16, 1)
    with pytest.raises(ValueError, match="belongs to another stream"):
        wrong.load_state_dict(state)


# Damage


def made(tmp_path: Path) -> Path:
    build(str(text(tmp_path / "text", [4000, 3000, 2500])), tmp_path / "shards", Recipe(shard_bytes=1500))
    return tmp_path / "shards"


def read_all(folder: Path) -> None:
    corpus = load_shards(folder)
    make_stream(corpus, config(folder), 32, 0).take(100)
    for tokens in (corpus.train_tokens, corpus.val_tokens):
        assert isinstance(tokens, ShardedTokens)
        tokens.check()


def test_every_flipped_byte_is_named(tmp_path: Path, small_blocks: None) -> None:
    """At every 7th byte of a shard, one flipped bit: an error with the shard's name."""
    folder = made(tmp_path)
    path = folder / "train-00002.tokens"
    whole = path.read_bytes()
    end = form.HEAD_BYTES + 2 * int.from_bytes(whole[8:16], "little")  # of the tokens
    for at in [*range(0, len(whole), 7), *range(end - 2, end + 10), len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(CorpusError, match=r"train-00002\.tokens"):
            read_all(folder)
    path.write_bytes(whole)
    read_all(folder)


def test_the_same_command_makes_a_damaged_or_missing_shard_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = made(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tokens")}
    (folder / "train-00001.tokens").unlink()
    (folder / "train-00002.tokens").write_bytes(files["train-00002.tokens"][:-3])
    (folder / "train-00003.tokens").write_bytes(
        files["train-00003.tokens"][:100] + b"x" + files["train-00003.tokens"][101:]
    )
    (folder / "tokens.json").unlink()
    (folder / ".train-00009.tokens.1.part").write_bytes(b"left by a killed process")
    with pytest.raises(CorpusError, match="makes it, as its last step"):
        load_shards(folder)
    build(str(tmp_path / "text"), folder, Recipe(shard_bytes=1500))
    assert all((folder / name).read_bytes() == data for name, data in files.items())
    same = {name for name, stamp in stamps.items() if (folder / name).stat().st_mtime_ns == stamp}
    assert set(stamps) - same == {"train-00001.tokens", "train-00002.tokens", "train-00003.tokens"}


@pytest.mark.parametrize("what", ["text", "recipe", "folder"])
def test_a_folder_with_something_else_is_refused(what: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    recipe = Recipe(shard_bytes=1500)
    if what == "text":
        (tmp_path / "text" / "more.txt").write_text("more\n")
    elif what == "recipe":
        recipe = Recipe(shard_bytes=1600)
    else:
        folder = tmp_path / "text"
    message = {"text": "another text", "recipe": "another recipe", "folder": "no shards of ours"}[what]
    with pytest.raises(CorpusError, match=message):
        build(str(tmp_path / "text"), folder, recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a\0b" * 50, "is NUL"), (b"\xff\xfe" * 50, "not UTF-8"), (b"", "all of the 1 files are empty")],
)
def test_what_is_no_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    recipe = Recipe("bpe", 300) if "UTF" in message else Recipe()
    with pytest.raises(CorpusError, match=message):
        build(str(tmp_path / "x.txt"), tmp_path / "shards", recipe)


@pytest.mark.parametrize(
    "more", [{"garbage_fraction": 0.3}, {"dedup": "exact"}, {"train_tokens": 10}, {"tokenizer": "bpe", "vocab_size": 300}]
)
def test_settings_that_shards_do_not_have_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shards are streamed as they are"):
        DataConfig(name="shards", path="x", **more)
    with pytest.raises(ValueError, match=r"data\.name=shards needs data\.path"):
        DataConfig(name="shards")


def hold(folder: Path, name: str, strategy: Callable[[bytes], st.SearchStrategy[bytes]], examples: int) -> int:
    whole = (folder / name).read_bytes()
    refused = []

    @mutations.few(examples)
    @given(strategy(whole))
    def each(data: bytes) -> None:
        refused.append(mutations.hold(lambda path: read_all(path.parent), folder / name, data, (CorpusError,)))

    each()
    return sum(refused)


@pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_changed_shards_and_lists_of_them_are_refused(soak: bool, tmp_path: Path, small_blocks: None) -> None:
    folder = made(tmp_path)
    read_all(folder)
    examples = 2000 if soak else 25
    assert hold(folder, "train-00001.tokens", mutations.bytes_of, examples) > examples / 2
    build(str(tmp_path / "text"), folder, Recipe(shard_bytes=1500))
    assert hold(folder, "tokens.json", lambda data: mutations.json_of(json.loads(data)), examples) > examples / 2


# Memory

MEASURED = """
import resource, sys
from pathlib import Path
from sparse_update.data.shards.reading import load_shards
from sparse_update.data.shards.stream import ShardStream

def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))

corpus = load_shards(Path(sys.argv[1]))
before = resident()
stream, most = ShardStream(corpus, 256, 0), 0
for _ in range(stream.windows // 2000):
    stream.take(2000)
    most = max(most, resident() - before)
print(most)
"""


def test_a_whole_epoch_takes_a_small_share_of_the_file_in_memory(tmp_path: Path) -> None:
    """96 MB of text are 192 MB of tokens; an epoch of them, in another order, adds less than a tenth of that."""
    line = ("".join(map(chr, range(33, 127))) + "\n") * 1000
    with (tmp_path / "large.txt").open("w") as file:
        for _ in range(1010):
            file.write(line)
    build(str(tmp_path / "large.txt"), tmp_path / "shards", Recipe(shard_bytes=2**25))
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tokens"))
    assert size > 190e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "shards")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < size / 10


# The command


def test_the_command_builds_goes_on_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import argparse

    def spikegate(*words: object) -> tuple[int, dict[str, Any], str]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        code = command.run(parser.parse_args([str(word) for word in words]))
        told = capsys.readouterr()
        return code, json.loads(told.out.splitlines()[-1]) if told.out else {}, told.err

    source, folder = text(tmp_path / "text", [4000, 3000, 2500]), tmp_path / "shards"
    code, said, _ = spikegate("build", source, folder, "--processes", 1)
    assert (code, said["shards"]) == (0, 2)
    assert spikegate("build", source, folder, "--processes", 1)[1] == said
    assert spikegate("check", folder)[0] == 0
    assert spikegate("build", source)[0] == 2
    assert spikegate("check", tmp_path / "none")[0] == 2
    assert spikegate("build", source, folder, "--tokenizer", "bpe")[0] == 2
    path = folder / "train-00000.tokens"
    path.write_bytes(path.read_bytes()[:900] + b"!" + path.read_bytes()[901:])
    code, said, error = spikegate("check", folder)
    assert (code, list(said["damaged"])) == (1, ["train-00000"])
    assert "train-00000.tokens is damaged: bytes 64 to" in error
