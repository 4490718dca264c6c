"""Which simulator runs which kind of node in which mode, and the tables of neuro/README.md that say so.

`python -m neuro.simulators.support` prints both tables; `--write` puts them into the README.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hardware.text import quoted
from neuro.graph import SpikingGraph
from neuro.graph.kinds import KINDS, PROJECTIONS, Parameter
from neuro.simulators.fixed_point import FAMILIES
from neuro.simulators.snntorch_backend import MODE as FLOAT
from neuro.simulators.snntorch_backend import NOT_HERE

# Backend -> its modes, the first one being its default.
MODES: dict[str, tuple[str, ...]] = {"fixed_point": ("lava", "chip", "xylo"), "lava": ("lava",), "snntorch": (FLOAT,)}
README = Path(__file__).resolve().parents[1] / "README.md"
_NO_MODEL = "Lava 0.10 has no fixed-point model of it"


def refusal(kind: str, backend: str, mode: str, corrected: bool = False) -> str:
    """Why a backend does not run a kind of population or projection in a mode; "" where it does.

    Args:
        kind: of `KINDS` or `PROJECTIONS`.
        backend, mode: of `MODES`.
        corrected: for delta and sigma_delta, whether the corrected model is meant.

    Raises:
        ValueError: a kind, backend or mode that does not exist.
    """
    check_mode(backend, mode)
    if kind not in KINDS and kind not in PROJECTIONS:
        raise ValueError(f"kind {quoted(kind)} does not exist; there is: {', '.join((*KINDS, *PROJECTIONS))}")
    if backend == "snntorch":
        return NOT_HERE.get(kind, "")
    if kind in KINDS and KINDS[kind].family not in ("", FAMILIES[mode]):
        if backend == "lava":
            return f"{_NO_MODEL}; {KINDS[kind].instead}"
        fitting = " or ".join(name for name, family in FAMILIES.items() if family == KINDS[kind].family)
        return f"it has the arithmetic of another chip; use mode {fitting}"
    if mode == "xylo" and kind in ("delay_dense", "conv"):
        return "Xylo has neither delays nor shared weights; write it as sparse"
    if mode == "lava" and kind in KINDS and not KINDS[kind].lava:
        if backend == "fixed_point" and KINDS[kind].extends:
            return ""
        return f"{_NO_MODEL}; {KINDS[kind].instead}" if KINDS[kind].instead else _NO_MODEL
    if backend == "lava" and corrected:
        return "Lava 0.10 has the residue model only"
    return ""


def check_mode(backend: str, mode: str) -> None:
    """ValueError unless the backend exists and has the mode."""
    if backend not in MODES:
        raise ValueError(f"backend {quoted(backend)} does not exist; there is: {', '.join(MODES)}")
    if mode not in MODES[backend]:
        raise ValueError(f"backend {backend} has no mode {quoted(mode)}; it has: {', '.join(MODES[backend])}")


def default_mode(graph: SpikingGraph, backend: str) -> str:
    """The first mode of a backend that has the arithmetic of the graph's chip; its first mode where none has.

    Raises ValueError for a backend that does not exist.
    """
    modes = MODES.get(backend, ())
    check_mode(backend, modes[0] if modes else "")
    families = {KINDS[population.kind].family for population in graph.populations} - {""}
    return next((mode for mode in modes if families <= {FAMILIES.get(mode)}), modes[0])


def refusals(graph: SpikingGraph, backend: str, mode: str) -> tuple[str, ...]:
    """Everything in a graph that a backend does not run in a mode, a sentence each; empty where it runs the graph."""
    found = []
    for population in graph.populations:
        reason = refusal(population.kind, backend, mode, bool(population.params.get("corrected", 0)))
        if reason:
            found.append(f"population {quoted(population.name)} ({population.kind}): {reason}")
    for projection in graph.projections:
        reason = refusal(projection.kind, backend, mode)
        if reason:
            found.append(f"projection {quoted(projection.name)} ({projection.kind}): {reason}")
    return tuple(found)


def support_table() -> str:
    """Markdown: a row for each kind, a column for each backend and mode."""
    columns = [(backend, mode) for backend, modes in MODES.items() for mode in modes]
    lines = [
        "| kind | " + " | ".join(f"{backend}, {mode}" for backend, mode in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for kind in (*KINDS, *PROJECTIONS):
        variants = kind in KINDS and "corrected" in KINDS[kind].parameters
        cells = []
        for backend, mode in columns:
            no = refusal(kind, backend, mode)
            both = variants and not refusal(kind, backend, mode, corrected=True)
            cells.append("no" if no else "yes" if not variants else "residue, corrected" if both else "residue")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds_table() -> str:
    """Markdown: ports, states and parameters of each kind of population."""
    lines = ["| kind | Lava | ports in | states | parameters (range, default) |", "|---|---|---|---|---|"]
    for name, kind in KINDS.items():
        parameters = ", ".join(_parameter(key, parameter) for key, parameter in kind.parameters.items())
        ports = ", ".join(kind.ports) + (f"; out: {', '.join(kind.outs)}" if len(kind.outs) > 1 else "")
        lines.append(
            f"| {name} | {kind.lava or '-'} | {ports or '-'} | {', '.join(kind.states) or '-'} | {parameters or '-'} |"
        )
    return "\n".join(lines)


def _parameter(key: str, parameter: Parameter) -> str:
    default = "" if parameter.default is None else f", {parameter.default}"
    each = "*" if parameter.per_neuron else ""
    return f"{key}{each} ({parameter.low}..{parameter.high}{default})"


TABLES = {"support": support_table, "kinds": kinds_table}


def with_tables(text: str) -> str:
    """A README's text with both tables as they are now, between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises ValueError where a pair of marks is missing.
    """
    for name, table in TABLES.items():
        before, found, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (found and end):
            raise ValueError(f"the marks <!-- {name} --> and <!-- /{name} --> are missing")
        text = f"{before}{found}{table()}\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(prog="python -m neuro.simulators.support", description="tables of what runs where")
    parser.add_argument("--write", action="store_true", help=f"put them into {README.name}")
    if parser.parse_args(argv).write:
        README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(table() for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
