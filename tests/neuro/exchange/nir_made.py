"""NIR graphs as other tools write them, with random numbers: neurons of each kind, grids, branches, loops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

DT_S = 1e-4


def nir_package() -> Any:
    import nir

    return nir


def neurons(kind: str, rng: np.random.Generator, shape: tuple[int, ...], **more: float) -> Any:
    """Neurons of one kind; time constants of a few steps, one value for all, thresholds near 1."""
    nir = nir_package()

    def full(value: float) -> np.ndarray:
        return np.full(shape, float(value))

    given = {"v_threshold": 1.0, "v_reset": 0.0, "v_leak": 0.0, **more}
    tau, synapse = DT_S * rng.uniform(2, 6), DT_S * rng.uniform(1.3, 3)
    threshold, reset, leak = (full(given[key]) for key in ("v_threshold", "v_reset", "v_leak"))
    if kind == "IF":
        return nir.IF(r=full(1), v_threshold=threshold, v_reset=reset)
    if kind == "I":
        return nir.I(r=full(1))
    if kind == "Threshold":
        return nir.Threshold(threshold=threshold)
    r = full(tau / DT_S)
    if kind == "LIF":
        return nir.LIF(tau=full(tau), r=r, v_leak=leak, v_threshold=threshold, v_reset=reset)
    if kind == "LI":
        return nir.LI(tau=full(tau), r=r, v_leak=leak)
    current = {"tau_syn": full(synapse), "tau_mem": full(tau), "r": r, "v_leak": leak, "w_in": full(synapse / DT_S)}
    if kind == "CubaLI":
        return nir.CubaLI(**current)
    return nir.CubaLIF(**current, v_threshold=threshold, v_reset=reset)


def graph(edges: list[tuple[str, str]], shape: tuple[int, ...], **nodes: Any) -> Any:
    """Nodes, an Input "input" of that shape, and an Output "out_NAME" behind each node that spikes or has a value."""
    nir = nir_package()
    made = {"input": nir.Input({"input": np.array(shape)}), **nodes}
    ways = list(edges)
    for name, node in nodes.items():
        if type(node).__name__ in ("LIF", "IF", "CubaLIF", "LI", "CubaLI", "I", "Threshold"):
            if type(node).__name__ in ("LI", "CubaLI", "I") and any(a == name for a, _ in edges):
                continue
            made[f"out_{name}"] = nir.Output({"output": np.array(node.input_type["input"])})
            ways.append((name, f"out_{name}"))
    return nir.NIRGraph(made, ways, type_check=False)


def chain(*named: tuple[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Edges and nodes one behind the other, from "input" on."""
    names = ["input", *(name for name, _ in named)]
    return list(pairwise(names)), dict(named)


def conv(rng: np.random.Generator, shape: tuple[int, int, int], out: int, **more: Any) -> Any:
    """Conv2d of random geometry over (channels, x, y)."""
    nir = nir_package()
    groups = int(more.get("groups", 1))
    kernel = more.get("kernel", tuple(int(n) for n in rng.integers(1, 4, 2)))
    weight = rng.normal(0.3, 0.5, (out, shape[0] // groups, *kernel))
    geometry = {
        "stride": tuple(int(n) for n in rng.integers(1, 3, 2)),
        "padding": tuple(int(n) for n in rng.integers(0, 3, 2)),
        "dilation": tuple(int(n) for n in rng.integers(1, 3, 2)),
    } | {key: value for key, value in more.items() if key in ("stride", "padding", "dilation")}
    bias = rng.normal(0, 0.1, out) if more.get("bias", True) else np.zeros(out)
    return nir.Conv2d(shape[1:], weight, bias=bias, groups=groups, **geometry)


def conv_shape(node: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(channels, x, y) behind a Conv2d or a pool, by torch."""
    import torch
    from torch.nn import functional

    x = torch.zeros((1, *shape), dtype=torch.float64)
    if hasattr(node, "kernel_size"):
        pair = [tuple(int(n) for n in v) for v in (node.kernel_size, node.stride, node.padding)]
        return tuple(functional.avg_pool2d(x, *pair).shape[1:])
    weight = torch.from_numpy(node.weight)
    keep = {k: v if isinstance(v := getattr(node, k), str) else tuple(v) for k in ("stride", "padding", "dilation")}
    return tuple(functional.conv2d(x, weight, groups=node.groups, **keep).shape[1:])


def pool(kind: str, kernel: int, stride: int | None = None, padding: int = 0) -> Any:
    pair = [np.array([n, n]) for n in (kernel, stride or kernel, padding)]
    return getattr(nir_package(), kind)(*pair)
