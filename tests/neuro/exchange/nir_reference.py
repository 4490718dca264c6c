"""A NIR graph run by Euler's rule in float64, from the definitions of its nodes; nothing of neuro is used.

`tau dv/dt = (v_leak - v) + r I` over a step dt, then a spike where v > v_threshold and v = v_reset there, or v less the
threshold where `reset` is "subtract"; v starts at v_reset. `reset` "snntorch" is snnTorch's subtraction without delay:
where a reset leaves v above the threshold, it goes off once more before the next step is compared. IF and I take their
input per step (r = 1). A neuron in a loop sees its own spikes of the step before; Delay(tau) gives the input of tau/dt
steps before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional


def run(graph: Any, x_TF: np.ndarray, dt_s: float = 1e-4, reset: str = "zero") -> dict[str, np.ndarray]:
    """One sample from rest: output name -> (T, size), flattened in NIR's order. `x_TF`: (T, ...), or a dict of them."""
    inputs = [name for name, node in graph.nodes.items() if type(node).__name__ == "Input"]
    given = x_TF if isinstance(x_TF, dict) else {inputs[0]: x_TF}
    machine = Machine(graph, dt_s, reset)
    rows = [
        machine.step({name: np.asarray(value[t], dtype=np.float64) for name, value in given.items()})
        for t in range(len(next(iter(given.values()))))
    ]
    return {name: np.stack([row[name].reshape(-1) for row in rows]) for name in rows[0]}


class Machine:
    """States of one graph."""

    def __init__(self, graph: Any, dt_s: float, reset: str = "zero") -> None:
        self.graph, self.dt, self.reset = graph, dt_s, reset
        self.before: dict[str, list[str]] = {name: [s for s, t in graph.edges if t == name] for name in graph.nodes}
        self.state: dict[str, Any] = {}
        self.last: dict[str, np.ndarray] = {}
        for name, node in graph.nodes.items():
            if type(node).__name__ == "NIRGraph":
                self.state[name] = Machine(node, dt_s, reset)

    def step(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done: dict[str, np.ndarray] = {}
        open_: set[str] = set()

        def value(name: str) -> np.ndarray:
            if name in done:
                return done[name]
            node = self.graph.nodes[name]
            kind = type(node).__name__
            if kind == "Delay":  # what it gives now is older than anything of this step: no loop through it
                return self.delayed(name, node)
            if name in open_:  # a loop: its message of the step before
                return self.last.get(name, np.zeros(tuple(node.output_type["output"])))
            open_.add(name)
            if kind == "Input":
                out = given[name].reshape(tuple(node.input_type["input"]))
            else:
                arrived = [value(source) for source in self.before[name]]
                out = self.through(name, node, sum(arrived[1:], arrived[0]))
            open_.discard(name)
            done[name] = out
            return out

        result = {name: value(name) for name, node in self.graph.nodes.items() if type(node).__name__ == "Output"}
        for name in self.graph.nodes:
            value(name)
        for name, node in self.graph.nodes.items():
            if type(node).__name__ == "Delay":
                arrived = sum((value(s) for s in self.before[name]), np.zeros(node.delay.shape))
                self.state.setdefault(name, []).append(arrived)
        self.last = done
        return result

    def delayed(self, name: str, node: Any) -> np.ndarray:
        past = self.state.setdefault(name, [])
        steps = np.rint(node.delay / self.dt).astype(int)
        assert steps.min() == steps.max() >= 1
        return past[-steps.flat[0]] if len(past) >= steps.flat[0] else np.zeros(node.delay.shape)

    def through(self, name: str, node: Any, x: np.ndarray) -> np.ndarray:
        kind = type(node).__name__
        if kind == "NIRGraph":
            (entry,) = node.input_type
            (out,) = self.state[name].step({entry: x}).values()
            return out
        if kind in ("Output", "Identity"):
            return x
        if kind in ("Linear", "Affine"):
            return node.weight @ x + (node.bias if kind == "Affine" else 0)
        if kind == "Scale":
            return node.scale * x
        if kind == "Flatten":
            return x.reshape(-1)
        if kind in ("AvgPool2d", "SumPool2d"):
            kernel, stride, padding = (tuple(int(n) for n in v) for v in (node.kernel_size, node.stride, node.padding))
            mean = functional.avg_pool2d(torch.from_numpy(x)[None], kernel, stride, padding)[0].numpy()
            return mean * (np.prod(kernel) if kind == "SumPool2d" else 1)
        if kind in ("Conv1d", "Conv2d"):
            geometry = {
                k: v if isinstance(v := getattr(node, k), str) else tuple(int(n) for n in np.atleast_1d(v))
                for k in ("stride", "padding", "dilation")
            }
            weight, bias = (torch.from_numpy(v.astype(np.float64)) for v in (node.weight, node.bias))
            convolve = functional.conv1d if kind == "Conv1d" else functional.conv2d
            return convolve(torch.from_numpy(x)[None], weight, bias, **geometry, groups=int(node.groups))[0].numpy()
        if kind == "Threshold":
            return (x > node.threshold).astype(np.float64)
        start = np.zeros(x.shape) + getattr(node, "v_reset", 0.0)
        state = self.state.setdefault(name, {"v": start, "i": np.zeros(x.shape)})
        if kind == "I":
            state["v"] = state["v"] + x
            return state["v"]
        if kind == "LI":
            state["v"] = state["v"] + self.dt / node.tau * (node.v_leak - state["v"] + node.r * x)
            return state["v"]
        if kind == "CubaLI":
            state["i"] = state["i"] + self.dt / node.tau_syn * (-state["i"] + node.w_in * x)
            state["v"] = state["v"] + self.dt / node.tau_mem * (node.v_leak - state["v"] + node.r * state["i"])
            return state["v"]
        if kind == "IF":
            assert np.all(node.r == 1)
            v = state["v"] + x
        elif kind == "LIF":
            v = state["v"] + self.dt / node.tau * (node.v_leak - state["v"] + node.r * x)
        else:
            assert kind == "CubaLIF", kind
            state["i"] = state["i"] + self.dt / node.tau_syn * (-state["i"] + node.w_in * x)
            v = state["v"] + self.dt / node.tau_mem * (node.v_leak - state["v"] + node.r * state["i"])
        if self.reset == "snntorch":
            held = state["v"] > node.v_threshold
            spikes = v - held * node.v_threshold > node.v_threshold
            state["v"] = v - spikes * node.v_threshold
            return spikes.astype(np.float64)
        spikes = v > node.v_threshold
        down = v - (node.v_threshold - node.v_reset) if self.reset == "subtract" else node.v_reset
        state["v"] = np.where(spikes, down, v)
        return spikes.astype(np.float64)
