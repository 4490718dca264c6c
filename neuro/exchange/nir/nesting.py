"""A NIR graph with graphs within it as one flat graph: names become `outer.inner`, inner inputs and outputs are joined.

NIR 1.0 lets a node be a graph; NIRTorch and what builds on it (snnTorch's exporter) write one for each nested module. An
edge to such a node leads to its Input and on from there, an edge from it comes from what leads to its Output; an edge may
name these, too (`outer.input`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hardware.text import listed, quoted
from neuro.exchange.nir.library import NotInNir

MOST_DEEP = 64
"""Graphs within graphs, one in the other."""

Edge = tuple[str, str]


def flattened(graph: Any) -> tuple[dict[str, Any], list[Edge]]:
    """Nodes by name and edges of a nir.NIRGraph, graphs within it replaced by what they hold.

    Raises NotInNir: an edge that stands twice or names a node that is not there, an inner graph without exactly one Input
    and one Output, an inner Input or Output that is not between two nodes, two nodes of one name, graphs nested too deep.
    """
    return _flattened(graph, "", 0)


def _flattened(graph: Any, where: str, deep: int) -> tuple[dict[str, Any], list[Edge]]:
    if deep > MOST_DEEP:
        raise NotInNir(f"node {quoted(where)}: {deep} graphs within one another; {MOST_DEEP} are the limit")
    edges = _checked(graph, where)
    nodes: dict[str, Any] = {}
    for name, node in graph.nodes.items():
        if type(node).__name__ != "NIRGraph":
            _add(nodes, name, node)
            continue
        path = f"{where}.{name}" if where else name
        inner, ways = _flattened(node, path, deep + 1)
        entry, out = (_only(inner, word, path) for word in ("Input", "Output"))
        for key, part in inner.items():
            if key not in (entry, out):
                _add(nodes, f"{name}.{key}", part)
        within = [(f"{name}.{a}", f"{name}.{b}") for a, b in ways]
        edges = _joined(_joined(_renamed(edges, within, name, entry, out), f"{name}.{entry}"), f"{name}.{out}")
    return nodes, edges


def _checked(graph: Any, where: str) -> list[Edge]:
    """Its edges, each once and between nodes that are there."""
    within = f" in {quoted(where)}" if where else ""
    counted = Counter(map(tuple, graph.edges))
    for (source, target), count in counted.items():
        if count > 1:
            raise NotInNir(
                f"the edge {quoted(source)} -> {quoted(target)}{within} stands {count} times, "
                "and readers differ on whether it then counts double. Keep one"
            )
        if not (_there(graph, source) and _there(graph, target)):
            raise NotInNir(f"the edge {quoted(source)} -> {quoted(target)}{within} names a node that is not there")
    return list(counted)


def _there(graph: Any, name: str) -> bool:
    """Whether a name is that of a node, or of one within a graph among the nodes."""
    if name in graph.nodes:
        return True
    cuts = [at for at, sign in enumerate(name) if sign == "."]
    inner = ((graph.nodes.get(name[:at]), name[at + 1 :]) for at in cuts)
    return any(type(node).__name__ == "NIRGraph" and _there(node, rest) for node, rest in inner)


def _add(nodes: dict[str, Any], name: str, node: Any) -> None:
    if name in nodes:
        raise NotInNir(f"node {quoted(name)} stands twice, once of them within a graph; rename one")
    nodes[name] = node


def _only(nodes: dict[str, Any], word: str, path: str) -> str:
    names = [name for name, node in nodes.items() if type(node).__name__ == word]
    if len(names) != 1:
        raise NotInNir(
            f"node {quoted(path)}: a graph within the graph with {len(names)} nodes of type {word} ({listed(names)}); "
            "one is needed"
        )
    return names[0]


def _renamed(edges: list[Edge], within: list[Edge], name: str, entry: str, out: str) -> list[Edge]:
    """Edges of the outer graph that now lead to the inner Input and come from the inner Output, and the inner ones."""
    outer = [(f"{name}.{out}" if a == name else a, f"{name}.{entry}" if b == name else b) for a, b in edges]
    return [*outer, *within]


def _joined(edges: list[Edge], name: str) -> list[Edge]:
    """Edges past a node that only hands on: each way into it goes on by each way out of it."""
    into = [a for a, b in edges if b == name]
    onward = [b for a, b in edges if a == name]
    if not into or not onward:
        raise NotInNir(f"node {quoted(name)}: nothing leads {'to' if not into else 'on from'} it; join it, or take it out")
    rest = [(a, b) for a, b in edges if name not in (a, b)]
    return rest + [(a, b) for a in into for b in onward]
