"""bench simulator calls ours without options, in turn with Lava and with the products alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from experiments.benches import simulator
from experiments.benches.peers import report
from hardware.meters.elsewhere import Elsewhere
from neuro.simulators.lava.client import LavaError
from tests.experiments.console import document as printed

STAND_IN = """
import json, sys
request = json.load(open(sys.argv[1]))
json.dump({"first_s": 0.5, "firing": [0.35, 0.36], "versions": {}}, open(request["facts"], "w"))
for _ in sys.stdin:
    print("SECONDS", sys.argv[2], flush=True)
"""


def stand_in(seconds: dict[str, float]) -> Any:
    """Processes that answer with given seconds in the place of those that measure."""
    asked = []

    def worker(arm: str, name: str, request: Any, folder: Any) -> Elsewhere:
        asked.append((name, request["steps"], request["clock"]))
        path = folder / f"{name}.request.json"
        path.write_text(simulator.report.json.dumps({**request, "facts": str(folder / f"{name}.facts.json")}))
        return Elsewhere(name, [sys.executable, "-c", STAND_IN, str(path), str(seconds[arm])])

    worker.asked = asked  # type: ignore[attr-defined]
    return worker


def test_ratios_are_to_ours_per_step_and_sample(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Any) -> None:
    """Lava's 100 steps of one sample take 0.1 s, ours 8 steps of the batch 0.02 s, the products 0.01 s."""
    worker = stand_in({"ours": 0.02, "lava": 0.1, "exact": 0.01})
    monkeypatch.setattr(report, "worker", worker)
    monkeypatch.setattr(simulator, "TARGETS", {("n16", "b1"): 1, ("n16", "b256"): 100})
    monkeypatch.chdir(tmp_path)
    assert simulator.main(["--widths", "16", "--steps", "8", "--threads", "1", "--rounds", "10"]) == 0
    out = capsys.readouterr().out
    found = printed(out)
    for batch in (1, 256):
        row = found["n16"][f"b{batch}"]
        assert row["lava"]["median"] == pytest.approx(0.1 / 100 / (0.02 / (8 * batch)))
        assert row["products"]["median"] == pytest.approx(0.5)
    assert [each["verdict"] for each in found["targets"]] == ["missed", "met"]  # 0.4 times as slow, 102.4 times
    assert "n16 b256: 102x Lava, target 100: met" in out
    assert {name.split(".")[1] for name, _, _ in worker.asked} == {"ours", "lava", "exact"}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rounds", "0"], "most_rounds = 0"), (["--threads", "0"], "--threads 0"), (["--steps", "0"], "1")],
)
def test_bad_arguments_are_named(words: list[str], message: str, capsys: Any) -> None:
    assert simulator.main(words) == 2
    assert message in capsys.readouterr().err


def test_without_lava_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def absent(*_: Any) -> Elsewhere:
        raise LavaError("no Lava here")

    monkeypatch.setattr(report, "worker", absent)
    assert simulator.main(["--widths", "16", "--steps", "4"]) == 1
    assert "bench simulator: no Lava here" in capsys.readouterr().err
