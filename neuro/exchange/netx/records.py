"""A `.net` file's layers as records of numpy arrays, every value checked for being what the format says.

The file: a group `layer` with the groups `0`, `1`, ... in the order of the data, each with `type`, `shape`, arrays and,
where it has neurons, a group `neuron` of device parameters (lava-dl 0.6.0, lava/lib/dl/netx/README.md and
lava/lib/dl/slayer/block/base.py, whose `export_hdf5` writes it). Shapes are (c, y, x), as torch's; a layer of n neurons in
a row is (n,) or (n, 1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware.text import listed, quoted, short
from neuro.exchange import hdf5
from neuro.exchange.netx.errors import NetxFileError, NotInNetx
from neuro.exchange.paths import existing_file

Shape = tuple[int, int, int]
MOST_NEURONS = 2**24  # of one layer: a chip has 2^20
KINDS = ("input", "dense", "dense_rec", "conv", "pool", "flatten", "average", "concat")
ALIASES = {"dense_comp": "dense"}  # what lava-dl's reader calls a dense layer of complex weights
REFUSED = {
    "convT": "a transposed convolution; the graph's convolutions have no such mode. Train with conv and stride 1, or"
    " with dense",
    "unpool": "an unpooling; the graph's convolutions have no such mode. Train without it, or with dense",
}


@dataclass(frozen=True)
class Layer:
    """One group of the file.

    Attributes:
        index: its number.
        kind: one of `KINDS`.
        numbers: path below the group ("weight", "neuron/iDecay") -> array of numbers as the file has it.
        texts: path -> text ("neuron/type").
    """

    index: int
    kind: str
    numbers: Mapping[str, np.ndarray]
    texts: Mapping[str, str]

    @property
    def where(self) -> str:
        """Its name in messages."""
        return f"layer {self.index} ({self.kind})"

    @property
    def neuron(self) -> str:
        """The neurons' type, such as "CUBA"; "" where the layer has none."""
        return self.texts.get("neuron/type", "")

    def has(self, key: str) -> bool:
        """Whether there are numbers under that path."""
        return key in self.numbers

    def whole(self, key: str) -> np.ndarray:
        """The numbers under a path as int64; NetxFileError where they are missing or no integers below 2^31."""
        if key in self.texts:
            raise NetxFileError(
                f"{self.where}: {key} is the text {quoted(self.texts[key])}, and numbers are needed; export it again"
            )
        if key not in self.numbers:
            raise NetxFileError(
                f"{self.where}: {quoted(key)} is missing; there is: {listed([*self.numbers, *self.texts]) or 'nothing'}"
            )
        value = self.numbers[key]
        if not value.size:
            raise NetxFileError(f"{self.where}: {quoted(key)} is empty")
        bad = ~(np.isfinite(value) & (np.abs(value) < 2**31))
        bad |= value != np.where(bad, 0, value).round()
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(np.atleast_1d(bad))[0]) if value.ndim else ()
            at = f"[{', '.join(map(str, place))}]" if place else ""
            raise NetxFileError(
                f"{self.where}: {key}{at} is {short(str(value[place]))}, and {int(bad.sum())} of {value.size} values are no"
                " whole numbers that fit; a .net file holds the chip's integers, so export the network with its"
                " quantisation on (a block's pre_hook_fx, lava-dl's quantize_8bit)"
            )
        return value.astype(np.int64)

    def number(self, key: str, default: int | None = None) -> int:
        """One integer for the whole layer."""
        if default is not None and key not in self.numbers:
            return default
        value = self.whole(key)
        if value.size > 1 and (value != value.flat[0]).any():
            raise NotInNetx(
                f"{self.where}: {key} differs from neuron to neuron ({int(value.min())}..{int(value.max())}), and a"
                f" population of type {quoted(self.neuron)} has one. Train with shared_param=True, or set it to one value"
            )
        return int(value.flat[0])

    def each(self, key: str) -> int | np.ndarray:
        """An integer for the whole layer, or int64 (n,) where they differ, n channels or neurons in the file's order."""
        value = self.whole(key).reshape(-1)
        return value if (value != value[0]).any() else int(value[0])

    def pair(self, key: str, default: int) -> tuple[int, int]:
        """(along x, along y) of a value that the file has as one number or as (y, x)."""
        if key not in self.numbers:
            return default, default
        value = self.whole(key).reshape(-1)
        if value.size not in (1, 2):
            raise NetxFileError(f"{self.where}: {key} has {value.size} values; (y, x) or one number is needed")
        return int(value[-1]), int(value[0])

    def shape(self) -> Shape | None:
        """(c, y, x) as the file states it, or None where it states none."""
        if "shape" not in self.numbers:
            return None
        sizes = [int(size) for size in self.whole("shape").reshape(-1)]
        return checked_shape(sizes, f"{self.where}: shape")


def checked_shape(sizes: list[int], what: str) -> Shape:
    """One to three sizes as (c, y, x): (n,) is n channels at one place, (y, x) one channel. NetxFileError otherwise."""
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise NetxFileError(f"{what} is {quoted(sizes)}; one to three sizes from 1 are needed, (c, y, x)")
    if math.prod(sizes) > MOST_NEURONS:
        raise NetxFileError(
            f"{what} is {quoted(sizes)}, that is {math.prod(sizes):,} neurons; {MOST_NEURONS:,} are the limit"
        )
    if len(sizes) == 1:
        return sizes[0], 1, 1
    c, y, x = [1, *sizes] if len(sizes) == 2 else sizes
    return c, y, x


def read_layers(path: Path) -> tuple[Layer, ...]:
    """All layers of a file, in order.

    Raises:
        FileNotFoundError: no such file.
        NetxFileError: no HDF5 file or one that was cut short, no layers in it, a number missing between them, or values
            that the file's length rules out.
        NotInNetx: a type of layer that no projection does.
        Hdf5Unavailable: no h5py.
    """
    existing_file(path)
    try:
        tree = hdf5.tree(path, NetxFileError)
        layers = tree.get("layer")
        if not isinstance(layers, dict):
            held = listed(list(tree)) or "nothing"
            raise NetxFileError(f"{path} has no group 'layer', which a .net file of lava-dl has; it holds: {held}")
        names = list(layers)
        for number in range(len(names)):
            if str(number) not in names:
                raise NetxFileError(f"{path}: layer {number} of {len(names)} is missing; there are: {listed(names)}")
        if not names:
            raise NetxFileError(f"{path}: its group 'layer' is empty; export the network again")
        return tuple(_layer(layers[str(number)], number) for number in range(len(names)))
    except (NetxFileError, NotInNetx) as error:
        text = str(error)
        raise type(error)(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # whatever h5py says of a damaged file
        raise NetxFileError(
            f"{path} is no whole HDF5 file: {short(str(error))}; it may have been cut short, so copy or export it again"
        ) from error


def _layer(group: Any, index: int) -> Layer:
    if not isinstance(group, dict):
        raise NetxFileError(f"layer {index} is no group of values; export the network again")
    numbers: dict[str, np.ndarray] = {}
    texts: dict[str, str] = {}

    def take(group: Mapping[str, Any], above: str) -> None:
        for name, item in group.items():
            if isinstance(item, dict):
                take(item, f"{above}{name}/")
                continue
            value = np.asarray(item)
            if value.dtype.kind in "biuf":
                numbers[above + name] = value
            elif value.dtype.kind in "SOU" and value.size:
                first = value.reshape(-1)[0]
                texts[above + name] = first.decode("ascii", "replace") if isinstance(first, bytes) else str(first)

    take(group, "")
    kind = texts.get("type", "")
    kind = ALIASES.get(kind, kind)
    if kind in REFUSED:
        raise NotInNetx(f"layer {index} is {REFUSED[kind]}")
    if kind not in KINDS:
        raise NotInNetx(f"layer {index} has type {quoted(kind)}, which is unknown; known: {', '.join(KINDS)}")
    return Layer(index, kind, numbers, texts)
