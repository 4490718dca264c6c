"""Our integer simulator against live Lava on saved graphs: equal over N values, or the first divergence."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from experiments.plain_json import dump_line
from neuro.graph import FILE_SUFFIX, GraphError, SpikingGraph, load_graph
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava_client import LavaError, LavaTimeout, LavaUnavailable
from neuro.simulators.lava_client import run as run_lava


def verify(target: Path, steps: int = 64, seed: int = 0) -> int:
    """Run every graph of `target` (a deployment's folder, or one file) on both. Exit code 0 only if all are equal."""
    paths = [target] if target.is_file() else sorted(target.rglob(f"*{FILE_SUFFIX}"))
    if not paths:
        print(f"verify: {target} holds no *{FILE_SUFFIX}; deploy a run first", file=sys.stderr)
        return 2
    document: dict[str, object] = {}
    equal = True
    try:
        for path in paths:
            graph = load_graph(path)
            inputs = random_inputs(graph, steps, seed)
            lava = run_lava(graph, inputs, record=RECORD_ALL)
            result = compare(lava, simulate(graph, inputs, record=RECORD_ALL))
            equal = equal and result.equal
            print(f"{path.name.removesuffix(FILE_SUFFIX)}: {result}")
            document[path.name.removesuffix(FILE_SUFFIX)] = {
                "equal": result.equal,
                "values": result.values,
                "text": str(result),
            }
    except (GraphError, LavaUnavailable, LavaTimeout, LavaError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1
    print(dump_line({"equal": equal, "steps": steps, "graphs": document}))
    return 0 if equal else 1


def random_inputs(graph: SpikingGraph, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """Uniform payloads of the width that each input's projections take, int64 (1, steps, size)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for population in graph.populations:
        if population.kind == "input":
            bits = min(p.num_message_bits for p in graph.projections if p.source == population.name)
            low, high = (0, 2) if bits == 0 else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
            found[population.name] = torch.randint(low, high, (1, steps, population.size), generator=generator)
    return found
