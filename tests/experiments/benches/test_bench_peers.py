"""bench simulator --peers: the same network for everybody, stand-ins measured in turn, targets judged by intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benches import simulator
from experiments.benches.peers import cases, float_peers, ours, report
from neuro.simulators.fixed_point import simulate
from tests.environments import python_of
from tests.experiments.console import document as printed

STAND_IN = """
import json, sys
request = json.load(open(sys.argv[1]))
if request["peer"] == "snntorch":
    raise SystemExit("no such simulator")
json.dump({"firing": [0.3], "first_s": 1.0, "versions": {"stand-in": "1"}}, open(request["facts"], "w"))
seconds = {"ours": 0.5, "exact": 0.25, "products": 0.5, "spikingjelly": 2.5, "norse": 2.0}[request["peer"]]
for _ in sys.stdin:
    print("SECONDS", seconds, flush=True)
"""


def small(conv: bool = False) -> cases.Case:
    if conv:
        return cases.Case("small", (9, 7, 2), ((3, (2, 1), (0, 1)), (4, (1, 2), (0, 0)), 5, 2), 2, 40, firing=0.2)
    return cases.dense("small", 24, 2, 40)


def by_hand(case: cases.Case, thresholds: list[int], found: dict[str, np.ndarray], layers: list[Any]) -> torch.Tensor:
    """The last layer's spikes (steps, batch, neurons) in float64, by the equations, without delays."""
    x = torch.from_numpy(found["x"]).double()
    for at, (layer, threshold) in enumerate(zip(layers, thresholds, strict=True)):
        weight = torch.from_numpy(found[f"w{at}"]).double()
        if layer["kind"] == "conv":
            flat = torch.nn.functional.conv2d(x.flatten(0, 1), weight, stride=layer["stride"], padding=layer["padding"])
        else:
            flat = x.flatten(0, 1).flatten(1) @ weight.T
        current = flat.unflatten(0, x.shape[:2])
        u = v = torch.zeros_like(current[0])
        sent = []
        for arrived in current:
            u = torch.trunc(u * cases.KEEP_U) + 64 * arrived
            v = torch.trunc(v * cases.KEEP_V) + u
            sent.append((v > 64 * threshold).double())
            v = v * (1 - sent[-1])
        x = torch.stack(sent)
    return x


@pytest.mark.parametrize("conv", [False, True])
def test_torch_gets_the_network_that_ours_runs(conv: bool) -> None:
    case = small(conv)
    x = cases.spikes(case)
    graph, firing = cases.graph_of(case, x)
    found, layers = cases.arrays(graph, case, x)
    thresholds = [int(graph.population(p.target).params["vth"]) for p in graph.projections]
    expected = by_hand(case, thresholds, found, layers)
    late = len(layers)
    inputs = torch.cat([x, torch.zeros_like(x[:, :late])], dim=1)
    sent = simulate(graph, {"x": inputs}).spikes[graph.outputs[0]][:, late:].transpose(0, 1)
    assert torch.equal(sent, expected.int())
    assert expected.mean() > 0.02
    assert firing[0] == pytest.approx(case.firing, abs=0.08)


def test_pilotnet_has_the_published_layer_sizes() -> None:
    sizes = [projection.ends[0] for projection in cases.projections(cases.pilotnet(1, 1))]
    assert sizes == [76032, 26460, 8064, 5632, 2560, 100, 50, 10, 1]


def test_thresholds_of_a_peer_are_those_at_which_it_fires_as_asked() -> None:
    class Plain(float_peers.Peer):
        """Fires where what arrives is above the threshold."""

        def neuron(self, threshold: float) -> Any:
            return threshold

        def fire(self, neuron: Any, current: torch.Tensor) -> torch.Tensor:
            return (current > neuron).float()

    current = torch.arange(1000.0).reshape(100, 10, 1)
    found = float_peers.threshold_for(Plain(0.75, 0.875), current, 0.25)
    assert 749 <= found < 750


def test_a_call_is_timed_until_it_has_lasted_long_enough() -> None:
    now = iter([0.0, 0.3, 1.0, 1.1, 2.0, 2.8])
    assert float_peers.median_s(lambda: None, 1.0, lambda: next(now)) == pytest.approx(0.3)


@pytest.mark.parametrize("arm", ours.ARMS)
def test_ours_answers_in_a_process_of_its_own(arm: str, tmp_path: Path) -> None:
    case = small()
    request, firing = cases.write(case, tmp_path)
    request |= {"threads": 1, "least_s": 0.0, "clock": "cpu"}
    with report.worker(arm, f"small.{arm}", request, tmp_path) as process:
        assert 0 < process() < 10
    facts = json.loads((tmp_path / f"small.{arm}.facts.json").read_text())
    assert facts["firing"] == pytest.approx(firing)
    assert facts["first_s"] > 0


def test_stand_ins_are_measured_and_judged(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def stand_in(arm: str, name: str, request: dict[str, Any], folder: Path) -> report.Elsewhere:
        path = folder / f"{name}.request.json"
        path.write_text(json.dumps({**request, "peer": arm, "facts": str(folder / f"{name}.facts.json")}))
        return report.Elsewhere(name, [sys.executable, str(script), str(path)])

    monkeypatch.setattr(report, "worker", stand_in)
    row = report.Row(small(), ("spikingjelly", "norse", "products", "exact"), {"spikingjelly": 4.0, "norse": 6.0})
    monkeypatch.setattr(report, "ROWS", (row,))
    monkeypatch.setattr(report, "NAMES", ("small",))
    monkeypatch.setattr(report, "PRODUCT_TARGETS", {"small": 0.5})
    assert simulator.main(["--peers", "--cases", "small", "--threads", "1"]) == 0
    found = printed(capsys.readouterr().out.splitlines()[-1])
    assert found["ratios"] == {"small": {"spikingjelly": 5.0, "norse": 4.0, "products": 1.0, "exact": 0.5}}
    verdicts = {each["peer"]: each["verdict"] for each in found["targets"]}
    assert verdicts == {"spikingjelly": "met", "norse": "missed", "exact": "met"}
    assert found["cases"]["small"]["us_per_step_and_sample"]["ours"] == pytest.approx(0.5e6 / 80)

    monkeypatch.setattr(report, "ROWS", (report.Row(small(), ("snntorch",), {}),))
    assert simulator.main(["--peers", "--cases", "small", "--threads", "1"]) == 1
    assert "small.snntorch: has ended; it wrote: no such simulator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(4.1, 4.2, "met"), (4.0, 4.2, "met"), (3.8, 3.9, "missed"), (3.9, 4.1, "too noisy"), (None, None, "too noisy")],
)
def test_a_target_is_judged_by_the_whole_interval(low: float | None, high: float | None, verdict: str) -> None:
    assert report.judged({"low": low, "high": high}, 4.0) == verdict


def test_the_faster_neuron_of_a_peer_is_held_against_the_target() -> None:
    def ratio(low: float) -> dict[str, Any]:
        return {"median": low + 0.05, "low": low, "high": low + 0.1, "best": low, "rounds": 10}

    documents = {"n256_b256": {"ratios": {"spikingjelly": ratio(5.0), "spikingjelly_lif": ratio(3.0)}}}
    documents["n1024_b64_rare"] = {"ratios": {"n1024_b64_often": ratio(4.5)}}
    found = {(each["case"], each["peer"]): each["verdict"] for each in report.targets(documents)}
    assert found == {("n256_b256", "spikingjelly_lif"): "missed", ("n1024_b64_rare", "n1024_b64_often"): "met"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--threads", "2", "--clock", "cpu"], "one thread is needed"),
        (["--without", "brian"], "--without brian: there is exact, lava, norse"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], message: str, capsys: Any) -> None:
    assert simulator.main(["--peers", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_the_environment_it_says_which(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SPIKEGATE_READERS_PYTHON", "/nowhere/python")
    monkeypatch.setattr(report, "ROWS", (report.Row(small(), ("norse",), {}),))
    monkeypatch.setattr(report, "NAMES", ("small",))
    assert simulator.main(["--peers", "--cases", "small", "--threads", "1"]) == 1
    assert "make readers" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("peer", list(float_peers.PEERS))
def test_every_peer_runs_the_network_and_fires_as_often(peer: str, conv: bool, tmp_path: Path) -> None:
    python_of("SPIKEGATE_READERS_PYTHON", ".venv-readers", "readers")
    request, firing = cases.write(small(conv), tmp_path)
    request |= {"threads": 1, "least_s": 0.0, "clock": "wall"}
    with report.worker(peer, peer, request, tmp_path) as process:
        assert 0 < process() < 30
    facts = json.loads((tmp_path / f"{peer}.facts.json").read_text())
    if peer in ("spikingjelly", "norse"):  # our equations, in real numbers
        assert facts["firing"] == pytest.approx(firing, abs=0.03)
    assert len(facts["firing"]) == len(firing)
    assert facts["versions"]["torch"].startswith("2.13")


@pytest.mark.lava
@pytest.mark.soak
@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_lava_runs_the_network_in_turn(clock: str, tmp_path: Path) -> None:
    python_of("SPIKEGATE_LAVA_PYTHON", ".venv-lava", "lava")
    request, _ = cases.write(small(), tmp_path)
    request |= {"threads": 1, "least_s": 0.2, "clock": clock, "steps": 50}
    with report.worker("lava", "lava", request, tmp_path) as process:
        assert 0.005 < process() < 30
        assert 0.005 < process() < 30
    assert json.loads((tmp_path / "lava.facts.json").read_text())["versions"] == {"lava-nc": "0.10.0"}
