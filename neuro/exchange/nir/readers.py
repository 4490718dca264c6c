"""What other tools make of a NIR graph: where a reader is known to stop, or to run another network without a word.

Versions looked at: snnTorch 1.0.0 with nirtorch 2.6 (`import_from_nir`, step 1e-4 s), norse 1.1.0 (`from_nir(dt=1e-4)`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hardware.text import listed, quoted
from neuro.exchange.nir.library import DT_S

READERS = ("snntorch", "norse")

_WEIGHTS = ("Input", "Output", "Linear", "Affine", "Conv2d", "Flatten")
_TAKES = {
    "snntorch": (*_WEIGHTS, "AvgPool2d", "LIF", "CubaLIF", "NIRGraph"),
    "norse": (*_WEIGHTS, "SumPool2d", "IF", "LIF", "CubaLIF", "NIRGraph"),
}
_WHY = {
    ("snntorch", "IF"): "becomes Leaky with beta 0.9, and stops with a TypeError",
    ("norse", "LI"): "is left out without a word",
}


def problems(graph: Any, reader: str) -> tuple[str, ...]:
    """Why a reader would not run a nir.NIRGraph as it is meant, a sentence for each node; empty where it would.

    Args:
        graph: nir.NIRGraph.
        reader: one of `READERS`; ValueError otherwise.
    """
    if reader not in READERS:
        raise ValueError(f"reader {quoted(reader)} is not known here; known: {', '.join(READERS)}")
    found = []
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    for word in ("Input", "Output"):
        ends = [name for name, kind in kinds.items() if kind == word]
        if len(ends) > 1:
            found.append(f"{listed(map(quoted, ends))}: {reader} takes one {word}")
    for name, node in graph.nodes.items():
        kind = kinds[name]
        where = f"node {quoted(name)} ({kind})"
        if kind not in _TAKES[reader]:
            found.append(f"{where}: {reader} {_WHY.get((reader, kind), 'has no such node')}")
            continue
        if kind == "NIRGraph":
            if reader == "snntorch" and not _after_its_sources(graph, name):
                found.append(f"{where}: snnTorch stops where it sorts before what leads to it")
            found += [f"in {quoted(name)}: {problem}" for problem in problems(node, reader) if not _is_loop(node, problem)]
        if reader == "norse" and len([1 for _, target in graph.edges if target == name]) > 1:
            found.append(f"{where}: norse runs it before all that leads to it has run, where two ways meet")
        if kind in ("LIF", "CubaLIF", "IF"):
            found += [f"{where}: {reason}" for reason in _neuron(node, kind, reader)]
    return tuple(found)


def _after_its_sources(graph: Any, name: str) -> bool:
    """Whether all that leads to a node sorts before it in turn, as `numbered` has it."""
    done: set[str] = set()
    for other in sorted(graph.nodes):
        if {source for source, target in graph.edges if target == other and source != other} <= done:
            done.add(other)
    return name in done


def _is_loop(graph: Any, problem: str) -> bool:
    """Whether two ways meet where a loop enters the neuron that the input enters, which norse runs."""
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    entries = [target for source, target in graph.edges if kinds[source] == "Input"]
    return "two ways meet" in problem and any(f"node {quoted(name)}" in problem for name in entries)


def _neuron(node: Any, kind: str, reader: str) -> list[str]:
    found = []
    if np.any(node.v_reset != 0):
        found.append(f"{reader} resets to 0 whatever v_reset says")
    if reader == "norse":
        if kind != "CubaLIF" and not np.allclose(node.r, 1):
            found.append("norse takes r for 1")
        if kind == "CubaLIF" and np.any(node.v_leak != 0):
            found.append("norse gives v_leak to the synapse too")
        return found
    if kind == "LIF":
        gain = node.r * DT_S / node.tau
        if np.ptp(gain) > 1e-9 * np.abs(gain).max():
            found.append("snnTorch takes r/tau of the first neuron for all")
    elif not np.allclose(node.r, node.tau_mem / DT_S):
        found.append("snnTorch wants r = tau_mem/dt")
    if np.any(node.v_leak != 0):
        found.append("snnTorch has no v_leak")
    if np.ptp(node.v_threshold) > 0:
        found.append("snnTorch takes one threshold for all neurons")
    return found
