"""Times our simulator as `float_peers.py` times others: `python -m experiments.benches.peers.ours REQUEST`.

REQUEST is a JSON file: "peer", one of ARMS; "graph", a file of `save_graph`; "input", an npz with "x" int8 (batch, steps,
neurons); "threads", "least_s", "clock" and "facts" as there.

"ours" is `simulate(graph, {"x": x})`: no option is passed. "exact" are the products of that run alone, as the simulator
computes them, on the messages that it sends; their seconds are those of as many products as the run has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.benches.peers.float_peers import serve
from experiments.benches.products import products
from neuro.graph import load_graph
from neuro.simulators.fixed_point import simulate

ARMS = ("ours", "exact")


def build(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The facts, and the call that is timed.

    Raises:
        ValueError: an arm that does not exist.
    """
    torch.set_num_threads(request["threads"])
    graph = load_graph(request["graph"])
    with np.load(request["input"], allow_pickle=False) as archive:
        inputs = {"x": torch.from_numpy(archive["x"])}
    begin = time.perf_counter()
    first = simulate(graph, inputs)
    first_s = time.perf_counter() - begin
    counts = [first.populations[p.target] for p in graph.projections]
    firing = [each.updates_active / (each.updates_active + each.updates_inactive) for each in counts]
    facts = {"firing": firing, "first_s": first_s, "versions": {"torch": torch.__version__}}
    if request["peer"] == "ours":
        return facts, lambda: simulate(graph, inputs)
    if request["peer"] != "exact":
        raise ValueError(f"arm {request['peer']!r}: must be one of {', '.join(ARMS)}")
    call, rows, how = products(graph, first, inputs["x"].shape[0] * inputs["x"].shape[1])
    assert rows == inputs["x"].shape[0] * inputs["x"].shape[1]
    return facts | {"arithmetic": how}, call


if __name__ == "__main__":
    serve(build)
