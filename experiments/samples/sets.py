"""Name of a data set -> its samples; what `data=` takes."""

from __future__ import annotations

from pathlib import Path

from experiments.samples.arrays import load_arrays
from experiments.samples.mackey_glass import load_mackey_glass
from experiments.samples.pictures import load_digits, load_fashion_mnist
from experiments.samples.records import DataError, Samples

ARRAYS, DIGITS, FASHION, MACKEY_GLASS = "arrays", "digits", "fashion_mnist", "mackey_glass"
NAMES = (ARRAYS, DIGITS, FASHION, MACKEY_GLASS)


def load_samples(name: str, path: str = "", *, seed: int = 0, scale: float = 0.0, calibration: int = 256) -> Samples:
    """Samples by name.

    Args:
        name: arrays, digits, fashion_mnist or mackey_glass.
        path: the .npz file of arrays; of fashion_mnist, a folder of its own.
        seed: of the split of digits, and of the history of Mackey-Glass.
        scale, calibration: of arrays; see `load_arrays`.

    Raises:
        DataError: an unknown name, a path that is missing or that nothing reads, or what the data set itself refuses.
    """
    if name not in NAMES:
        raise DataError(f"data={name!r} is unknown; known: {', '.join(NAMES)}")
    if name == ARRAYS:
        if not path:
            raise DataError("data=arrays needs the file: path=FILE.npz")
        return load_arrays(Path(path), scale=scale, calibration=calibration)
    if scale:
        raise DataError(f"scale={scale:g} is for data=arrays; {name} has a scale of its own")
    if name == FASHION:
        return load_fashion_mnist(Path(path) if path else None)
    if path:
        raise DataError(f"path={path} is for data=arrays and data=fashion_mnist; data={name} reads no file")
    return load_digits(seed) if name == DIGITS else load_mackey_glass(seed)
