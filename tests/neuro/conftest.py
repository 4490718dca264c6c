"""Shared by the tests of neuro: random graphs, random inputs, and the rule for tests that need Lava."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from neuro.graph import Population, Projection, SpikingGraph, truncate_weights
from neuro.simulators.lava import client as lava_client
from tests.environments import missing, python_of
from tests.neuro import networks as random_networks

GraphMaker = Callable[[int], SpikingGraph]


def _weights(rng: np.random.Generator, targets: int, sources: int, sign_mode: str, bits: int, spread: float) -> np.ndarray:
    raw = np.rint(rng.normal(0, spread, (targets, sources))).astype(np.int64)
    if sign_mode != "mixed":
        raw = np.abs(raw) * (1 if sign_mode == "excitatory" else -1)
    return truncate_weights(raw, sign_mode, bits)


def _lif(rng: np.random.Generator, name: str, size: int) -> Population:
    per_neuron = bool(rng.integers(2))
    return Population(
        name,
        "lif",
        size,
        {
            "du": int(rng.choice([0, 300, 1500, 4095])),
            "dv": int(rng.choice([0, 128, 1000, 4095])),
            "vth": int(rng.integers(5, 120)),
            "bias_mant": rng.integers(-60, 120, size) if per_neuron else int(rng.integers(0, 100)),
            "bias_exp": rng.integers(0, 7, size) if per_neuron else int(rng.integers(0, 7)),
        },
    )


@pytest.fixture(scope="session")
def lif_graph() -> GraphMaker:
    """Seed -> a random network of 2 to 4 lif layers; every third seed has a loop, every fourth a loop on itself."""

    def make(seed: int) -> SpikingGraph:
        rng = np.random.default_rng(seed)
        sizes = [int(n) for n in rng.integers(3, 14, int(rng.integers(3, 6)))]
        names = ["input"] + [f"layer{i}" for i in range(1, len(sizes))]
        populations = [Population("input", "input", sizes[0])]
        populations += [_lif(rng, name, size) for name, size in zip(names[1:], sizes[1:], strict=True)]
        ends = [(i, i + 1) for i in range(len(sizes) - 1)]
        if seed % 3 == 0:
            ends.append((len(sizes) - 1, 1))
        if seed % 4 == 0:
            ends.append((1, 1))
        if seed % 5 == 0:
            ends.append((0, len(sizes) - 1))
        projections = []
        for number, (source, target) in enumerate(ends):
            mode, bits = (
                str(rng.choice(["mixed", "excitatory", "inhibitory"], p=[0.65, 0.25, 0.1])),
                int(rng.integers(4, 9)),
            )
            projections.append(
                Projection(
                    f"w{number}",
                    names[source],
                    names[target],
                    "a_in",
                    _weights(rng, sizes[target], sizes[source], mode, bits, 70),
                    weight_exp=int(rng.integers(-2, 3)),
                    num_weight_bits=bits,
                    sign_mode=mode,
                    num_message_bits=0 if source else int(rng.choice([0, 0, 5])),
                )
            )
        return SpikingGraph(tuple(populations), tuple(projections), (names[-1],))

    return make


@pytest.fixture(scope="session")
def mlp_graph() -> Callable[..., SpikingGraph]:
    """(seed, squared, sizes) -> an MLP of graded neurons, ReLU or squared ReLU through a product population."""

    def make(seed: int, squared: bool = False, sizes: tuple[int, int, int] = (12, 20, 9)) -> SpikingGraph:
        rng = np.random.default_rng(seed)
        n_in, n_hidden, n_out = sizes
        first = Projection(
            "fc1", "x", "hidden", "a_in", _weights(rng, n_hidden, n_in, "mixed", 8, 60), -5, num_message_bits=8
        )
        second = _weights(rng, n_out, n_hidden, "mixed", 8, 60)
        populations = [Population("x", "input", n_in), Population("hidden", "graded_relu", n_hidden, {"vth": 0})]
        projections = [first]
        source = "hidden"
        if squared:
            identity = 2 * np.eye(n_hidden, dtype=np.int64)
            populations.append(Population("squared", "product", n_hidden, {"vth": 1, "exp": 4}))
            projections += [
                Projection(f"copy{i}", "hidden", "squared", f"a_in{i}", identity, -1, num_message_bits=16) for i in (1, 2)
            ]
            source = "squared"
        populations.append(Population("y", "graded", n_out, {"vth": int(rng.integers(0, 3))}))
        projections.append(Projection("fc2", source, "y", "a_in", second, -7, num_message_bits=16))
        return SpikingGraph(tuple(populations), tuple(projections), ("y",))

    return make


@pytest.fixture(scope="session")
def messages() -> Callable[..., dict[str, np.ndarray]]:
    """(graph, seed, batch, steps) -> random inputs inside the payload range of every projection they feed."""

    def make(graph: SpikingGraph, seed: int, batch: int, steps: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        made = {}
        for name in graph.inputs:
            low = max(p.payload_range[0] for p in graph.outgoing(name))
            high = min(p.payload_range[1] for p in graph.outgoing(name))
            values = rng.integers(low, high + 1, (batch, steps, graph.population(name).size))
            made[name] = (values * (rng.random(values.shape) < 0.6)).astype(np.int32)
        return made

    return make


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def lava_python() -> Path:
    """Lava's interpreter; without one the test skips, or fails where SPIKEGATE_REQUIRE lists lava."""
    try:
        return lava_client.find_python()
    except lava_client.LavaUnavailable as error:
        missing("lava", str(error))


@pytest.fixture(scope="session")
def lava(lava_python: Path) -> Iterator[lava_client.LavaWorker]:
    """One worker for every test of this process that only wants Lava's answer."""
    with lava_client.LavaWorker(lava_python, timeout_s=240) as worker:
        yield worker


@pytest.fixture(scope="session")
def readers_python() -> Path:
    return python_of("SPIKEGATE_READERS_PYTHON", ".venv-readers", "readers")


@pytest.fixture(scope="session")
def neurobench_python() -> Path:
    return python_of("SPIKEGATE_NEUROBENCH_PYTHON", ".venv-neurobench", "neurobench")


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """The generator of random networks, tests/neuro/networks.py: `network(seed, kinds)`, `messages(graph, seed, ...)`."""
    return random_networks
