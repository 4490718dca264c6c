"""Text through Hugging Face datasets, all of it local files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sparse_update.data.hub import HubStream, documents, documents_of, load
from sparse_update.data.records import CorpusError
from sparse_update.data.sources import split
from sparse_update.data.tokens import ByteTokenizer

datasets = pytest.importorskip("datasets", reason="needs the extra hub (datasets)")

TEXTS = [f"document {i}: " + "abcdefghij"[i % 10] * (20 + i) for i in range(30)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    datasets.disable_progress_bars()


@pytest.fixture
def places(tmp_path):
    (tmp_path / "a").mkdir()
    rows = [{"text": text, "id": f"n{i}"} for i, text in enumerate(TEXTS)]
    (tmp_path / "a" / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:17]))
    (tmp_path / "a" / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[17:]))
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "all.parquet"))
    return tmp_path


@pytest.mark.parametrize("name", ["a", "a/*.jsonl", "lines.txt", "all.parquet"])
def test_every_kind_of_file_gives_the_same_documents(places, name):
    found = documents(str(places / name))
    assert [d.text.decode() for d in found] == TEXTS
    assert len({d.name for d in found}) == len(TEXTS)
    assert [d.text for d in documents(str(places / name), limit=5)] == [d.text for d in found[:5]]


def test_sides_of_the_split_do_not_move_when_documents_are_added(places):
    some, more = documents(str(places / "a" / "one.jsonl")), documents(str(places / "a"))
    held = {d.name for d in split(more, 0.3)[1]}
    assert {d.name for d in split(some, 0.3)[1]} == held & {d.name for d in some}
    assert {d.name for d in documents(str(places / "a"), name_field="id")} == {f"n{i}" for i in range(30)}


def test_empty_rows_go_and_copies_keep_apart():
    rows = [{"text": "same"}, {"text": ""}, {"text": "same"}, {"text": None}]
    assert [d.text for d in documents_of(rows)] == [b"same", b"same"]


def test_bad_datasets_are_told(places):
    (places / "mixed").mkdir()
    for name in ("x.txt", "y.jsonl"):
        (places / "mixed" / name).write_text("{}\n")
    with pytest.raises(CorpusError, match="names no file"):
        load(str(places / "nothing"))
    with pytest.raises(CorpusError, match="one kind"):
        load(str(places / "mixed"))
    with pytest.raises(CorpusError, match="no field 'body'"):
        documents(str(places / "a"), text_field="body")
    with pytest.raises(CorpusError, match="text is needed"):
        documents_of([{"text": 3}])
    with pytest.raises(CorpusError, match="no text"):
        documents_of([{"text": ""}])


def stream(places, streaming=True, **kw):
    return HubStream(load(str(places / "a"), streaming), ByteTokenizer(), 16, **{"holdout_fraction": 0.3, **kw})


@pytest.mark.parametrize("streaming", [True, False])
def test_windows_are_the_documents_in_order_by_side(places, streaming):
    train, val = split(documents(str(places / "a")), 0.3)
    for side, docs in (("train", train), ("val", val)):
        line = np.frombuffer(b"".join(d.text for d in docs), dtype=np.uint8).astype(np.int64)
        windows = (len(line) - 1) // 16
        batch = stream(places, streaming, side=side).take(windows)
        expected = np.stack([line[i * 16 : i * 16 + 17] for i in range(windows)])
        assert np.array_equal(batch.tokens.numpy(), expected)
        assert batch.tokens.dtype == torch.int64


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stream_goes_on_where_it_was_and_over_epochs(places, streaming):
    whole = stream(places, streaming)
    parts = [whole.take(7).tokens for _ in range(20)]
    assert whole.epoch >= 1
    first = stream(places, streaming)
    for expected in parts[:9]:
        assert torch.equal(first.take(7).tokens, expected)
    second = stream(places, streaming)
    second.load_state_dict(first.state_dict())
    for expected in parts[9:]:
        assert torch.equal(second.take(7).tokens, expected)
    assert second.position == 140


def test_a_stream_refuses_what_it_cannot_serve(places):
    with pytest.raises(CorpusError, match="one epoch of the dataset gives"):
        stream(places).take(4000)
    with pytest.raises(CorpusError, match="one epoch of the dataset gives"):
        HubStream([{"text": ""}], ByteTokenizer(), 16).take(1)
    with pytest.raises(ValueError, match="side is 'train' there"):
        stream(places, side="val").load_state_dict(stream(places).state_dict())
    with pytest.raises(ValueError, match="train or val"):
        stream(places, side="test")
