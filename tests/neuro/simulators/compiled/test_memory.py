"""What a run holds at a time does not grow with its steps, but for what is recorded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators import fixed_point
from neuro.simulators.compiled import program
from neuro.simulators.lines import Line


def wide(hidden: int, kind: str = "lif", loop: bool = False) -> SpikingGraph:
    """8 inputs, a wide layer, on a loop or not, and one neuron that is the output."""
    rng = np.random.default_rng(0)
    params = {"du": 1000, "dv": 300, "vth": 90} if kind == "lif" else {"vth": 3}
    populations = (
        Population("x", "input", 8),
        Population("wide", kind, hidden, params),
        Population("out", "lif", 1, {"du": 1000, "dv": 300, "vth": 2000}),
    )
    bits = 0 if kind == "lif" else 24
    projections = [
        Projection("w", "x", "wide", "a_in", 2 * rng.integers(-60, 80, (hidden, 8)), num_message_bits=8),
        Projection("o", "wide", "out", "a_in", 2 * rng.integers(-60, 80, (1, hidden)), num_message_bits=bits),
    ]
    if loop:
        projections.append(Projection("r", "wide", "wide", "a_in", 2 * rng.integers(-20, 20, (hidden, hidden)), -6))
    return SpikingGraph(populations, tuple(projections), ("out",))


@pytest.mark.parametrize(("kind", "loop"), [("lif", False), ("lif", True), ("delta", False)])
def test_buffers_are_as_large_for_a_long_run_as_for_a_short_one(kind: str, loop: bool, monkeypatch: Any) -> None:
    held = 5000
    monkeypatch.setattr(fixed_point, "CHUNK_VALUES", held)
    largest: dict[str, int] = {}

    def note(what: str, size: int) -> None:
        largest[what] = max(largest.get(what, 0), size)

    begin, put, sums = Line.begin, Line.put, program.sums_only

    def begun(line: Line, steps: int) -> torch.Tensor:
        room = begin(line, steps)
        note("messages", line.whole.numel())
        return room

    def done(line: Line, *given: Any) -> None:
        put(line, *given)
        note("messages", line.whole.numel())

    def summed(total: torch.Tensor) -> Any:
        note("sums", total.numel())
        return sums(total)

    monkeypatch.setattr(Line, "begin", begun)
    monkeypatch.setattr(Line, "put", done)
    monkeypatch.setattr(program, "sums_only", summed)
    graph = wide(90, kind, loop)
    rng, found = np.random.default_rng(1), []
    for steps in (400, 4000):
        largest.clear()
        activity = fixed_point.simulate(graph, {"x": rng.integers(0, 2, (1, steps, 8))})
        assert activity.populations["wide"].updates_active > 0
        assert 0 < max(largest.values()) <= held + 2 * 90  # a block, and the steps before it that delays ask for
        found.append(dict(largest))
    assert found[0] == found[1]


PEAK = """
import resource, sys
import numpy as np
from tests.neuro.simulators.compiled.test_memory import wide
from neuro.simulators.fixed_point import simulate
graph, peaks = wide(1024, loop=sys.argv[1] == "loop"), []
for steps in (20_000, 100_000):
    simulate(graph, {"x": np.random.default_rng(0).integers(0, 2, (1, steps, 8), dtype=np.int8)}, record=())
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.soak
@pytest.mark.parametrize("way", ["feed-forward", "loop"])
def test_resident_memory_is_flat_over_a_hundred_thousand_steps(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, way], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    # The messages of the wide layer alone would be 80 MB more; inputs and outputs, which are kept, are 9 numbers a step.
    assert int(done.stdout) < 20_000  # KiB
