"""Samples for a deployment: what is read, what is generated, and every kind of data that is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.samples.arrays import load_arrays
from experiments.samples.mackey_glass import BETA, GAMMA, POWER, integrate, mackey_glass
from experiments.samples.pictures import FASHION_FILES, fashion_folder, load_fashion_mnist, read_idx
from experiments.samples.records import DataError
from experiments.samples.sets import Recording, load_samples

X, Y = np.arange(40, dtype=np.float64).reshape(10, 4) / 7, np.arange(10) % 3


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", x=X, y=Y, x_train=X + 1, y_train=Y)
    found = load_samples("arrays", str(path))
    assert (found.task, found.x.dtype, found.y.dtype) == ("classes", np.float32, np.int64)
    np.testing.assert_array_equal(found.x, X.astype(np.float32))
    np.testing.assert_array_equal(found.x_train, (X + 1).astype(np.float32))
    some = found.held_out(2)
    np.testing.assert_array_equal(some.x, found.x[[2, 7]])
    np.testing.assert_array_equal(some.y, found.y[[2, 7]])

    without = load_arrays(saved(tmp_path / "b.npz", x=X, y=Y.astype(np.float32)), calibration=4)
    assert (without.task, len(without.x_train), len(without.x)) == ("values", 4, 6)
    assert "first 4 samples" in without.notes[0]
    tokens = load_arrays(saved(tmp_path / "c.npz", x=np.ones((5, 3), np.int32), y=Y[:5]), calibration=1)
    assert tokens.x.dtype == np.int64
    scaled = load_arrays(saved(tmp_path / "d.npz", x=np.full((5, 3), 255, np.uint8), y=Y[:5]), calibration=1, scale=1 / 255)
    np.testing.assert_allclose(scaled.x, 1.0, rtol=1e-6)


SPOILT = {
    "no x": ({"y": Y}, "no array 'x'"),
    "unknown": ({"x": X, "y": Y, "labels": Y}, "an array 'labels' that nothing reads"),
    "lengths": ({"x": X, "y": Y[:9], "x_train": X}, r"y has shape \(9,\) for 10 samples"),
    "nan": ({"x": np.where(X > 5, np.nan, X), "y": Y, "x_train": X}, r"x holds 4 values that are NaN .* index \(9, 0\)"),
    "inf": ({"x": X, "y": np.full(10, np.inf), "x_train": X}, "y holds 10 values that are NaN or infinite"),
    "negative": ({"x": X, "y": Y - 1, "x_train": X}, "the class -1"),
    "text": ({"x": np.full((10, 4), "a"), "y": Y}, "only numbers belong here"),
    "objects": ({"x": np.array([None] * 10), "y": Y}, "not readable as .npz"),
    "bytes": ({"x": np.zeros((10, 4), np.uint8), "y": Y}, "scale=0.0039"),
    "complex": ({"x": X, "y": Y * 1j, "x_train": X}, "answers are whole numbers"),
    "few": ({"x": X, "y": Y}, "calibration_samples"),
    "shapes": ({"x": X, "y": Y, "x_train": X[:, :3]}, r"x_train holds samples \(3,\)"),
    "y_train alone": ({"x": X, "y": Y, "y_train": Y}, "y_train and no x_train"),
    "one value a sample is none": ({"x": Y, "y": Y, "x_train": Y}, "at least one sample"),
    "empty": ({"x": X[:0], "y": Y[:0], "x_train": X}, "at least one sample"),
    "huge": ({"x": X * 1e60, "y": Y, "x_train": X}, "beyond float32"),
    "cubes of classes": ({"x": X, "y": np.zeros((10, 2, 2), int), "x_train": X}, "one for each step"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_arrays_that_cannot_be_used_are_named(name: str, tmp_path: Path) -> None:
    arrays, message = SPOILT[name]
    with pytest.raises(DataError, match=message):
        load_arrays(saved(tmp_path / "a.npz", **arrays))  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", x=X, y=Y)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cut short"):
            load_arrays(path)
    with pytest.raises(DataError, match="no such file"):
        load_arrays(tmp_path / "nothing.npz")
    for words, message in (
        (("arrays",), "path=FILE"), (("imagenet",), "unknown"), (("digits", "a.npz"), "reads no file"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            load_samples(*words)
    with pytest.raises(DataError, match="scale of its own"):
        load_samples("digits", scale=2.0)


def test_digits_are_split_by_class() -> None:
    found = load_samples("digits", seed=3)
    assert found.x.shape == (450, 1, 8, 8)
    assert found.x_train.shape == (1347, 1, 8, 8)
    assert 0 <= found.x.min() < found.x.max() == 1
    counts = np.bincount(found.y)
    assert counts.max() - counts.min() <= 3


def idx(values: np.ndarray) -> bytes:
    """The idx format, written by its description."""
    return struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_idx_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {name: rng.integers(0, 10, (6, 28, 28) if "idx3" in name else (6,)).astype(np.uint8) for name in FASHION_FILES}
    for name, values in parts.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
    found = load_fashion_mnist(tmp_path)
    np.testing.assert_array_equal(found.y, parts["t10k-labels-idx1-ubyte"])
    np.testing.assert_allclose(found.x_train[:, 0] * 255, parts["train-images-idx3-ubyte"], rtol=1e-6)

    whole = idx(parts["t10k-labels-idx1-ubyte"])
    plain = tmp_path / "plain"
    for content in (b"", whole[:3], whole[:6], whole[:-1], whole + b"x", b"\0\0\x0d\x01" + whole[4:], b"PK" + whole):
        plain.write_bytes(content)
        with pytest.raises(DataError, match=r"no idx file|cut short"):
            read_idx(plain)
    packed = tmp_path / f"{FASHION_FILES[0]}.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        load_fashion_mnist(tmp_path)
    packed.unlink()
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path)


def test_where_fashion_mnist_is_not_installed_one_line_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPIKEGATE_FASHION_MNIST", str(tmp_path / "nowhere"))
    assert fashion_folder() is None
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_samples("fashion_mnist")


def test_mackey_glass_within_one_delay_is_the_closed_form() -> None:
    """With a constant past the delayed term is constant, and the equation a linear one."""
    start, tau = 0.9, 17.0
    found = integrate(np.full(171, start), 170)
    level = BETA * start / (1 + start**POWER) / GAMMA
    t = np.arange(171) / 10
    np.testing.assert_allclose(found, level + (start - level) * np.exp(-GAMMA * t), rtol=1e-9)
    # and where it is at rest, it stays: x = 1 solves beta / (1 + x^n) = gamma
    np.testing.assert_allclose(integrate(np.ones(171), 500), 1.0, rtol=1e-12)
    with pytest.raises(DataError, match=r"tau is 0\.55"):
        mackey_glass(3, tau=tau / 17 * 0.55)
    with pytest.raises(DataError, match="length is 0"):
        mackey_glass(0)


def test_mackey_glass_streams_foretell_their_own_series() -> None:
    found = load_samples("mackey_glass", seed=1)
    assert found.x.shape == found.y.shape == (20, 100, 1)
    assert found.task == "values"
    np.testing.assert_array_equal(found.x[0, 10:], found.y[0, :-10])  # ten units ahead
    np.testing.assert_array_equal(found.x[1, :10], found.y[0, -10:])  # and the next stream goes on
    assert 0.1 < found.x.std() < 0.4
    assert not np.array_equal(found.x, load_samples("mackey_glass", seed=2).x)


def recordings() -> dict[str, Any]:
    """Three recordings of two events each, on a sensor of 2 x 1."""
    return {
        "t": np.array([0, 150, 30, 30, 7, 999]), "x": np.array([0, 1, 1, 1, 0, 0]), "y": np.zeros(6, int),
        "polarity": np.array([0, 1, 1, 1, 0, 1]), "recording": np.array([0, 0, 1, 1, 2, 2]), "label": np.array([0, 1, 1]),
    }  # fmt: skip


def test_events_become_streams(tmp_path: Path) -> None:
    how = Recording(step_us=100, steps=2, sensor=(2, 1), flat=True)
    found = load_samples("events", str(saved(tmp_path / "e.npz", **recordings())), calibration=1, recording=how)
    assert found.x_train.tolist() == [[[1, 0, 0, 0], [0, 0, 0, 1]]]  # falling at x 0, then rising at x 1
    assert found.x.tolist() == [[[0, 0, 0, 2], [0, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]
    assert found.y.tolist() == [1, 1]
    assert "1 of 6 events come later" in found.notes[0]
    chosen = saved(tmp_path / "f.npz", **recordings(), train=np.array([False, True, False]))
    whole = load_samples("events", str(chosen), recording=Recording(100, 2, (2, 1)))
    assert whole.x.shape == (2, 2, 2, 1, 2)
    assert whole.y.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "how", "message"),
    [
        ({}, Recording(), "data=events needs step_us"),
        ({"t": np.array([150, 0, 30, 30, 7, 999])}, None, "recording 0: t falls"),
        ({"x": np.array([0, 1, 1, 1, 0, 2])}, None, r"recording 2: x\[1\] is 2"),
        ({"recording": np.array([0, 0, 1, 1, 2, 3])}, None, "there are 3 labels"),
        ({"label": np.zeros(0, int)}, None, "one class for each recording"),
        ({"train": np.ones(3, bool)}, None, "3 of 3 recordings would set the ranges"),
    ],
)
def test_events_that_cannot_be_used_are_named(
    wrong: dict[str, Any], how: Recording | None, message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "e.npz", **recordings() | wrong)
    with pytest.raises(DataError, match=message):
        load_samples("events", str(path), calibration=1, recording=how or Recording(100, 2, (2, 1)))
    with pytest.raises(DataError, match="for data=events"):
        load_samples("digits", recording=Recording(steps=3))
