"""Duplicates, exact and near: found when they are there, and hardly ever when they are not."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.dedup import distinct_documents, exact_keys, is_new, keys_of, near_keys
from sparse_update.data.records import Document


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Different windows of real text, (300, 129)."""
    corpus = load_corpus(DataConfig(name="pydoc"))
    return corpus.train_tokens[: 300 * 129].reshape(300, 129).astype(np.int64)


def edited(rows: np.ndarray, edits: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = rows.copy()
    for row in out:
        row[rng.choice(row.size, edits, replace=False)] = 200 + rng.integers(50)
    return out


def shared(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the rows that have a key in common with the row of the same number."""
    return float((a == b).any(axis=1).mean())


def jaccard(a: np.ndarray, b: np.ndarray, size: int = 8) -> float:
    """By definition, over the sets of shingles."""
    values = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        one, two = ({tuple(z[i : i + size]) for i in range(len(z) - size + 1)} for z in (x, y))
        values.append(len(one & two) / len(one | two))
    return float(np.mean(values))


def test_exact_keys_tell_apart_what_differs_in_one_token_or_in_order(rows):
    keys = exact_keys(rows)[:, 0]
    assert len(set(keys.tolist())) == len({tuple(row) for row in rows.tolist()}) == 300
    assert np.array_equal(keys, exact_keys(rows[:, :])[:, 0])
    for place in (0, 64, 128):
        other = rows.copy()
        other[:, place] += 1
        assert not (exact_keys(other)[:, 0] == keys).any()
    swapped = rows.copy()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    differ = swapped[:, 3] != swapped[:, 4]
    assert not (exact_keys(swapped)[:, 0] == keys)[differ].any()


def test_near_keys_find_edits_that_exact_ones_miss(rows):
    once, again = edited(rows, 1, 0), edited(rows, 1, 1)
    assert shared(exact_keys(once), exact_keys(again)) < 0.02
    # the documented rate: 1 - (1 - J^4)^8 at the agreement J that the edits leave
    j = jaccard(once, again)
    assert 0.7 < j < 0.85
    assert shared(near_keys(once), near_keys(again)) == pytest.approx(1 - (1 - j**4) ** 8, abs=0.08)
    heavy = edited(rows, 12, 2)
    assert shared(near_keys(once), near_keys(heavy)) < 0.35


def test_unrelated_text_shares_nearly_no_keys(rows):
    near = near_keys(rows)
    assert np.mean([shared(near, np.roll(near, k, axis=0)) for k in range(1, 20)]) < 0.01


def test_short_rows_are_one_shingle():
    keys = near_keys(np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1]]))
    assert np.array_equal(keys[0], keys[1])
    assert not (keys[0] == keys[2]).any()


def test_is_new_remembers_what_it_saw():
    seen: set[int] = set()
    assert [is_new(keys, seen) for keys in ([1, 2], [3], [2, 9], [9])] == [True, True, False, False]


@pytest.mark.parametrize("method", ["exact", "near"])
def test_documents_that_repeat_training_or_held_out_text_are_left_out(rows, method):
    texts = [row.astype(np.uint8).tobytes() * 3 for row in rows[:6]]
    small = bytearray(texts[1])
    small[200] ^= 1
    train = [Document(str(i), text) for i, text in enumerate([*texts[:4], texts[0], bytes(small), texts[5]])]
    kept = [d.name for d in distinct_documents(train, [Document("held", texts[5])], method)]
    assert kept == (["0", "1", "2", "3", "5"] if method == "exact" else ["0", "1", "2", "3"])


def test_load_corpus_drops_repeated_files(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_bytes(f"text {i % 10} of ten, ".encode() * 20)
    plain = load_corpus(DataConfig(name="files", path=str(tmp_path)))
    clean = load_corpus(DataConfig(name="files", path=str(tmp_path), dedup="exact"))
    assert clean.val_names == plain.val_names
    texts = {clean.train_tokens[a:b].tobytes() for a, b in zip(clean.train_offsets, clean.train_offsets[1:], strict=False)}
    assert len(texts) == len(clean.train_names) == 10 - len({int(n.split(".")[0]) % 10 for n in plain.val_names})


def test_both_methods_have_one_width_of_keys(rows):
    assert keys_of(rows, "exact").shape == (300, 1)
    assert keys_of(rows, "near").shape == (300, 8)
