"""`.net` files as lava-dl writes them, made through h5py, and their evaluation straight from the format's definition.

Nothing of ours is imported here. `evaluate` reads the file again and computes in the file's own orders, (c, y, x) and
torch's kernels, with Python's and numpy's integers: at step t each layer takes what the layer before sent at step t - 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

LOIHI = {"type": "LOIHI", "iDecay": 4096, "vDecay": 300, "vThMant": 12, "refDelay": 1, "wgtExp": 0, "tauRho": 0.5}
CUBA = {"type": "CUBA", "iDecay": 1000, "vDecay": 200, "vThMant": 30, "refDelay": 1, "gradedSpike": False}
SDNN = {"type": "SDNN", "activation": "relu", "vThMant": 3}
RF = {"type": "RF_PHASE", "sinDecay": 2000, "cosDecay": 3000, "vThMant": 20, "gradedSpike": False}


def write(path: Path, layers: list[dict[str, Any]]) -> Path:
    """One file; a layer is a dict of values, its "neuron" a dict of its own."""
    with h5py.File(path, "w") as file:
        for index, layer in enumerate(layers):
            group = file.create_group(f"layer/{index}")
            for key, value in layer.items():
                if key == "type":
                    group.create_dataset(key, (1,), "S10", [value.encode()])
                elif key == "neuron":
                    for name, number in value.items():
                        group.create_dataset(f"neuron/{name}", data=number)
                else:
                    group.create_dataset(key, data=value)
        file.create_dataset("simulation/Ts", data=1)
    return path


def even(rng: np.random.Generator, shape: tuple[int, ...], most: int = 60) -> np.ndarray:
    """Even weights as float32, which is how lava-dl stores them."""
    return (2 * rng.integers(-most // 2, most // 2 + 1, shape)).astype(np.float32)


def toward_zero(value: np.ndarray) -> np.ndarray:
    """Integers / 4096."""
    return np.sign(value) * (np.abs(value) // 4096)


def correlate(picture: np.ndarray, kernel: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int) -> np.ndarray:
    """(c, y, x) and (out, c / groups, y, x) -> (out, y, x): the kernel laid over the picture as it is, tap by tap."""
    (sy, sx), (py, px), (dy, dx) = stride, padding, dilation
    padded = np.pad(picture, ((0, 0), (py, py), (px, px)))
    outs, per_group, high, wide = kernel.shape
    rows = (padded.shape[1] - dy * (high - 1) - 1) // sy + 1
    columns = (padded.shape[2] - dx * (wide - 1) - 1) // sx + 1
    found = np.zeros((outs, rows, columns), dtype=np.int64)
    for o in range(outs):
        first = o // (outs // groups) * per_group
        for i in range(per_group):
            for y in range(rows):
                for x in range(columns):
                    for ky in range(high):
                        for kx in range(wide):
                            tap = padded[first + i, y * sy + ky * dy, x * sx + kx * dx]
                            found[o, y, x] += int(kernel[o, i, ky, kx]) * int(tap)
    return found


class Neurons:
    """One layer's neurons in their file's parameters; a shape's last axes are the layer's."""

    def __init__(self, group: Any, shape: tuple[int, ...]) -> None:
        self.type = "" if "neuron" not in group else group["neuron/type"][()].decode()
        self.get = {} if "neuron" not in group else {k: v[()] for k, v in group["neuron"].items() if k != "type"}
        self.bias = np.zeros(shape, dtype=np.int64)
        if "bias" in group and group["type"][0] != b"input":  # there it belongs to what arrives
            bias = np.array(group["bias"]).astype(np.int64).reshape(-1)
            self.bias += (
                bias.reshape((-1,) + (1,) * (len(shape) - 1)) if bias.size in (1, shape[0]) else bias.reshape(shape)
            )
        zero = np.zeros(shape, dtype=np.int64)
        self.u, self.v, self.sum, self.act, self.rest, self.wait = (zero.copy() for _ in range(6))

    def reset(self) -> None:
        self.u[:], self.v[:] = 0, 0

    def each(self, key: str, axes: int) -> np.ndarray:
        """A parameter, one for all or one for each channel, as an array that meets a layer's."""
        return np.asarray(self.get[key]).astype(np.int64).reshape((-1,) + (1,) * (axes - 1))

    def step(self, a: np.ndarray, imag: np.ndarray | None = None) -> np.ndarray:
        if self.type in ("LOIHI", "CUBA"):
            current, voltage, threshold = (self.each(key, a.ndim) for key in ("iDecay", "vDecay", "vThMant"))
            self.u = toward_zero(self.u * (4096 - current)) + 64 * a
            self.v = toward_zero(self.v * (4096 - voltage)) + self.u + 64 * self.bias
            self.v[self.wait > 0] = 0
            self.wait = np.maximum(self.wait - 1, 0)
            fire = self.v > 64 * threshold
            self.v[fire] = 0
            self.wait[fire] = int(self.get.get("refDelay", 1)) - 1
            return fire.astype(np.int64)
        if self.type.startswith("RF"):
            assert imag is not None
            sin, cos = (self.each(key, a.ndim) for key in ("sinDecay", "cosDecay"))
            before = self.v
            real = toward_zero(cos * self.u) - toward_zero(sin * self.v) + 64 * a
            self.v = toward_zero(sin * self.u) + toward_zero(cos * self.v) + 64 * imag
            self.u, threshold = real, 64 * int(self.get["vThMant"])
            if self.type == "RF_PHASE":
                return ((self.u >= threshold) & (self.v >= 0) & (before < 0)).astype(np.int64)
            fire = self.v >= threshold
            self.u[fire], self.v[fire] = 0, threshold - 1
            return fire.astype(np.int64)
        self.sum = self.sum + a
        if not self.type or "sigma_output" in self.get:
            return self.sum
        value = np.maximum(self.sum + (self.bias << 12), 0)
        change = value - self.act + self.rest
        sent = np.where(np.abs(change) >= int(self.get["vThMant"]) << 12, change, 0)
        self.act, self.rest = value, change - sent
        return sent >> 6


def evaluate(path: Path, frames: np.ndarray, steps: int, reset: int | None = None) -> dict[int, np.ndarray]:
    """Messages of every layer with neurons, and of an average: index -> int64 (steps, *shape).

    Args:
        frames: what arrives at layer 0's neurons, or its messages where it has none here: int (T, c, y, x) or (T, n);
            silence after T. Before a layer 0 of type SDNN, its messages.
        reset: LOIHI and CUBA neurons forget everything every so many steps, first when the first frame reaches them.
    """
    with h5py.File(path, "r") as file:
        groups = [file[f"layer/{i}"] for i in range(len(file["layer"]))]
        kinds = [group["type"][0].decode() for group in groups]
        shapes: list[tuple[int, ...]] = []
        for kind, group in zip(kinds, groups, strict=True):
            stated = tuple(int(n) for n in group["shape"][()].reshape(-1)) if "shape" in group else ()
            shapes.append((stated[0],) if len(stated) == 3 and stated[1:] == (1, 1) and kind != "conv" else stated)
        state = {i: Neurons(group, shapes[i]) for i, group in enumerate(groups) if kinds[i] not in ("flatten", "concat")}
        sent: dict[int, list[np.ndarray]] = {i: [] for i in range(-1, len(groups))}
        depth = {-1: 0}
        for index, kind in enumerate(kinds):
            bare = kind in ("flatten", "concat") or (kind == "input" and state[index].type in ("", "SDNN"))
            depth[index] = depth[index - 1] + (not bare)

        def before(index: int, t: int) -> np.ndarray:
            """What leaves the layer `index` for the layer behind it, one step ago."""
            if index == -1 or (kinds[index] == "input" and state[index].type in ("", "SDNN")):
                return frames[t - 1] if 0 < t <= len(frames) else np.zeros_like(frames[0])
            if kinds[index] == "flatten":
                return before(index - 1, t).reshape(-1)
            if kinds[index] == "concat":
                joined = [index - 1, *(int(i) for i in groups[index]["layers"][()])]
                return np.concatenate([before(i, t).reshape(-1) for i in joined])
            return sent[index][t - 1] if t else np.zeros(shapes[index], dtype=np.int64)

        for t in range(steps):
            for index, (kind, group) in enumerate(zip(kinds, groups, strict=True)):
                if kind in ("flatten", "concat") or (kind == "input" and state[index].type in ("", "SDNN")):
                    continue
                if reset is not None and state[index].type in ("LOIHI", "CUBA") and (t - depth[index]) % reset == 0:
                    state[index].reset()
                x = before(index - 1, t)
                if kind == "average":
                    sent[index].append(x.reshape(shapes[index][0], -1).sum(axis=1))
                    continue
                parts = [f"weight/{p}" for p in ("real", "imag")] if "weight/real" in group else ["weight"]
                sums = [
                    _sum(kind, group, group[part][()].astype(np.int64) if kind != "input" else None, x) for part in parts
                ]
                if kind == "dense_rec" and t:
                    sums[0] = sums[0] + group["weight_rec"][()].astype(np.int64) @ sent[index][t - 1].reshape(-1)
                power = int(state[index].get.get("wgtExp", 0))
                sums = [(s << power if power >= 0 else s >> -power).reshape(shapes[index]) for s in sums]
                sent[index].append(state[index].step(*sums))
    return {index: np.stack(found) for index, found in sent.items() if found}


def _sum(kind: str, group: Any, weight: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    if weight is None:
        return x
    if kind.startswith("dense"):
        return weight.reshape(-1, x.size) @ x.reshape(-1)
    if weight.ndim == 5:
        weight = weight[..., 0]

    def pair(key: str, default: Any) -> Any:
        value = np.array(group[key][()] if key in group else default).reshape(-1)
        return (int(value[0]), int(value[-1]))

    channels = len(x)
    if kind == "pool":
        weight = np.repeat(weight, channels, axis=0)
        return correlate(x, weight, pair("stride", weight.shape[2:]), pair("padding", 0), pair("dilation", 1), channels)
    return correlate(x, weight, pair("stride", 1), pair("padding", 0), pair("dilation", 1), int(group["groups"][()]))
