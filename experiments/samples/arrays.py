"""`data=arrays path=FILE.npz`: one's own samples, the arrays x and y, and x_train for the ranges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.samples.records import DataError, Samples
from hardware.text import listed, quoted
from neuro.graph.archive import ArchiveError, read_archive

KEYS = ("x", "y", "x_train", "y_train")
LAYOUT = (
    "a file has the arrays x (held-out samples, one along the first axis) and y (classes as whole numbers, or values as "
    "floats), and may have x_train (samples that set the ranges) and y_train; numpy.savez(path, x=x, y=y) writes one"
)
LARGEST_BYTES = 8 * 2**30


def load_arrays(path: Path, *, scale: float = 0.0, calibration: int = 256) -> Samples:
    """Read and check an .npz file.

    Args:
        path: of a file of arrays; see LAYOUT.
        scale: above 0, x becomes float32 and is multiplied by it (1 / 255 for bytes of a picture). 0: floats stay as they
            are, and whole numbers are token numbers, int64.
        calibration: of a file without x_train, samples from its beginning that set the ranges and are not judged by.

    Raises:
        DataError: no such file, one that is not .npz or is cut short, a missing or unknown array, sizes or types that do
            not fit, NaN.
    """
    found = read_npz(path, KEYS, ("x", "y"), LAYOUT)
    x = _inputs("x", found["x"], scale)
    y = _answers("y", found["y"])
    title = f"{path.name}"
    if "x_train" in found:
        train = _inputs("x_train", found["x_train"], scale)
        y_train = _answers("y_train", found["y_train"]) if "y_train" in found else None
        if y_train is not None and y_train.dtype != y.dtype:
            raise DataError(
                f"{path}: y_train is {found['y_train'].dtype}, y {found['y'].dtype}; one of them is of another task"
            )
        return Samples(title, str(path), train, y_train, x, y)
    if "y_train" in found:
        raise DataError(f"{path} has y_train and no x_train; {LAYOUT}")
    if len(x) <= calibration:
        raise DataError(
            f"{path}: x holds {len(x):,} samples and there is no x_train, so the first {calibration:,} would set the "
            "ranges and none would be left to judge by; add x_train, or ask for fewer with calibration_samples"
        )
    if len(y) != len(x):
        raise DataError(f"{path}: y has shape {y.shape} for {len(x):,} samples; one answer for each is needed")
    note = f"no x_train in the file: its first {calibration:,} samples set the ranges, the others are held out"
    return Samples(title, str(path), x[:calibration], y[:calibration], x[calibration:], y[calibration:], (note,))


def read_npz(path: Path, known: Sequence[str], needed: Sequence[str], layout: str) -> dict[str, NDArray[Any]]:
    """The arrays of a file, all of them of `known` names and those `needed` among them; `layout` says what a file holds.

    Raises DataError for a file that is missing, cut short, too large, or has other arrays.
    """
    if not path.is_file():
        raise DataError(f"path={path}: there is no such file; {layout}")
    try:
        found = read_archive(path, LARGEST_BYTES)
    except (OSError, ArchiveError) as error:
        raise DataError(f"{path} is not readable as .npz, or cut short: {quoted(str(error))}; {layout}") from error
    unknown = [name for name in found if name not in known]
    missing = [name for name in needed if name not in found]
    if unknown or missing:
        what = f"no array {quoted(missing[0])}" if missing else f"an array {quoted(unknown[0])} that nothing reads"
        raise DataError(f"{path} has {what} (it has: {listed(found) or 'none'}); {layout}")
    return found


def _inputs(name: str, value: NDArray[Any], scale: float) -> NDArray[np.generic]:
    if value.dtype.kind == "b":
        return (value.astype(np.float32) * np.float32(scale or 1.0)).astype(np.float32)
    if value.dtype.kind in "iu" and not scale:
        if value.dtype.itemsize == 1:
            raise DataError(
                f"{name} is {value.dtype}, bytes, and scale=0 would take them for token numbers; scale=0.00392157 "
                "makes floats 0..1 of the bytes of a picture, scale=1 floats as they are; for tokens save int64"
            )
        return value.astype(np.int64)
    if value.dtype.kind not in "iuf":
        raise DataError(f"{name} is {value.dtype}; samples are floats, or whole numbers for tokens")
    large = value.astype(np.float64) if value.dtype.itemsize > 4 else value
    with np.errstate(over="ignore"):
        found = (large * scale if scale else large).astype(np.float32)
    if np.isinf(found).any() and np.isfinite(value).all():
        raise DataError(f"{name} holds values beyond float32 (up to {float(np.abs(value).max()):.3g}); scale it down")
    return found


def _answers(name: str, value: NDArray[Any]) -> NDArray[np.generic]:
    if value.dtype.kind in "iub":
        return value.astype(np.int64)
    if value.dtype.kind != "f":
        raise DataError(f"{name} is {value.dtype}; answers are whole numbers for classes, floats for values")
    return value.astype(np.float32)
