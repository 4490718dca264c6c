"""Pictures that come with a package: scikit-learn's digits, and Fashion-MNIST as Debian ships it.

Shape letters: N pictures, 1 channel, H rows, W columns.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.samples.arrays import LARGEST_BYTES
from experiments.samples.records import DataError, Samples
from neuro.graph.archive import DEFLATE_RATIO

GREY_LEVELS = 16  # of the digits
HELD_OUT_DIGITS = 450
FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
"""Where the Debian package `dataset-fashion-mnist` puts its files; older and newer releases differ."""
FASHION_FOLDER_VARIABLE = "SPIKEGATE_FASHION_MNIST"
FASHION_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
HOW_TO_GET = (
    "Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist (Debian, Ubuntu) puts it under "
    f"{FASHION_FOLDERS[0]}; path=FOLDER names another folder with its four idx files"
)


def load_digits(seed: int = 0) -> Samples:
    """scikit-learn's 1,797 digits of 8 x 8, float32 (N, 1, 8, 8) in 0..1; 450 are held out, split by class at random.

    Raises DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as bundled
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DataError("data=digits needs scikit-learn, which has them in its wheel: pip install scikit-learn") from error
    digits = bundled()
    x = (digits.images[:, None] / GREY_LEVELS).astype(np.float32)
    y = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(y)), test_size=HELD_OUT_DIGITS, stratify=y, random_state=seed)
    return Samples(
        "digits", "scikit-learn's load_digits (UCI optical digits, test part)", x[train], y[train], x[test], y[test]
    )


def load_fashion_mnist(folder: Path | None = None) -> Samples:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv:1708.07747): 60,000 pictures to train on, 10,000 held out.

    float32 (N, 1, 28, 28) in 0..1, classes 0..9.

    Args:
        folder: with the four idx files, gzipped or not; None: where SPIKEGATE_FASHION_MNIST or the Debian package says.

    Raises:
        DataError: not on this machine, or a file that is cut short or is another one.
    """
    place = folder or fashion_folder()
    if place is None:
        raise DataError(HOW_TO_GET)
    parts = [read_idx(_file(place, name)) for name in FASHION_FILES]
    for name, value in zip(FASHION_FILES, parts, strict=True):
        wanted = 3 if "idx3" in name else 1
        if value.ndim != wanted:
            raise DataError(f"{place / name}: holds {value.ndim} dimensions, expected {wanted}: it is another file")
    x_train, x = ((part[:, None] / np.float32(255)).astype(np.float32) for part in (parts[0], parts[2]))
    return Samples(
        "fashion_mnist", f"Fashion-MNIST, {place}", x_train, parts[1].astype(np.int64), x, parts[3].astype(np.int64)
    )


def fashion_folder() -> Path | None:
    """Where the files are; None where there are none."""
    named = os.environ.get(FASHION_FOLDER_VARIABLE)
    places = (Path(named),) if named else FASHION_FOLDERS
    return next((place for place in places if place.is_dir()), None)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {name}.gz; {HOW_TO_GET}")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A file in LeCun's idx format with unsigned bytes: magic number, sizes, values; gzipped where its name ends in .gz.

    Raises DataError for one that is cut short, too long, or of another type.
    """
    try:
        most = path.stat().st_size * (DEFLATE_RATIO if path.suffix == ".gz" else 1)
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened:
            start = opened.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08" or not 1 <= start[3] <= 8:
                raise DataError(f"{path} is no idx file of unsigned bytes (it begins with {start.hex() or 'nothing'})")
            dims = start[3]
            sizes = opened.read(4 * dims)
            shape = struct.unpack(f">{dims}I", sizes) if len(sizes) == 4 * dims else ()
            wanted = math.prod(shape) if shape else -1
            content = opened.read(wanted + 1) if 0 <= wanted <= min(most, LARGEST_BYTES) else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; get the file again") from error
    if len(content) != wanted:
        found = f"more than {wanted:,}" if len(content) > wanted else "fewer"
        raise DataError(
            f"{path}: its head promises {wanted:,} values and {found} follow: it is cut short or another file; get it again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
