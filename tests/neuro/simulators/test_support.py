"""What runs where: the table follows from the code, the README holds it, and every cell is tried."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from neuro.graph import Convolution, GraphError, Population, Projection, SpikingGraph
from neuro.graph.kinds import KINDS, PROJECTIONS
from neuro.simulators import snntorch_backend
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava import client as lava_client
from neuro.simulators.support import (
    MODES,
    README,
    check_mode,
    default_mode,
    kinds_table,
    main,
    refusal,
    refusals,
    support_table,
    with_tables,
)

LIF = {"du": 4095, "dv": 0}
PARAMS = {
    "lif": {**LIF, "vth": 1},
    "ternary_lif": {**LIF, "vth_hi": 1, "vth_lo": -1},
    "lif_reset": {**LIF, "vth": 1, "reset_interval": 3},
    "lif_refractory": {**LIF, "vth": 1, "refractory": 2},
    "lif_soft": {**LIF, "vth": 1},
    "lif_general": {**LIF, "vth": 1},
    "rf": {"sin_decay": 2000, "cos_decay": 3000, "vth": 1},
    "rf_iz": {"sin_decay": 2000, "cos_decay": 3000, "vth": 1},
    "sigma": {},
    "delta": {"vth": 1},
    "sigma_delta": {"vth": 1},
    "graded": {"vth": 1},
    "graded_relu": {"vth": 1},
    "product": {"vth": 1, "exp": 0},
    "norm": {"vth": 1},
    "xylo": {"dash_mem": 1, "dash_syn": 1, "vth": 1},
    "xylo_out": {"dash_mem": 1, "dash_syn": 1, "vth": 1},
}
INPUT = {"x": np.array([[[3, 1], [0, -2], [4, 4], [0, 0], [1, 1]]])}


def one(kind: str, **more) -> SpikingGraph:
    """A graph that has a population or a projection of that kind, and else only what every backend has."""
    if kind in PROJECTIONS:
        extra = {
            "delay_dense": {"delays": np.array([[1, 0], [0, 2]])},
            "conv": {"conv": Convolution((2, 1, 1), padding=(1, 0))},
        }.get(kind, {})
        weight = np.array([[[[2]], [[4]], [[-2]]]]) if kind == "conv" else np.array([[2, 4], [-2, 2]])
        wire = Projection("w", "x", "n", "a_in", weight, num_message_bits=8, kind=kind, **extra)
        return SpikingGraph((Population("x", "input", 2), Population("n", "lif", 2, PARAMS["lif"])), (wire,), ("n",))
    node, ports = ("lif", ("a_in",)) if kind == "input" else (kind, KINDS[kind].ports)
    wires = tuple(Projection(port, "x", "n", port, np.array([[2, 4], [-2, 2]]), num_message_bits=8) for port in ports)
    return SpikingGraph((Population("x", "input", 2), Population("n", node, 2, PARAMS[node] | more)), wires, ("n",))


def of_xylo(kind: str) -> SpikingGraph:
    """The same in a network of Xylo: input, hidden neuron, read-out."""
    extra = {
        "delay_dense": {"delays": np.array([[1, 0], [0, 2]])},
        "conv": {"conv": Convolution((2, 1, 1), padding=(0, 0))},
    }.get(kind, {})
    weight = np.array([[[[2]]]]) if kind == "conv" else np.array([[2, 4], [-2, 2]])
    hidden = kind if kind in KINDS and kind not in ("input", "xylo_out") else "xylo"
    way = kind if kind in PROJECTIONS else "dense"
    return SpikingGraph(
        (
            Population("x", "input", 2),
            Population("n", hidden, 2, PARAMS[hidden]),
            Population("y", "xylo_out", 2, PARAMS["xylo_out"]),
        ),
        (
            *(Projection(p, "x", "n", p, weight, num_message_bits=5, kind=way, **extra) for p in KINDS[hidden].ports),
            Projection("out", "n", "y", "a_in", np.array([[2, 4], [-2, 2]]), num_message_bits=6),
        ),
        ("y",),
    )


ALL = (*KINDS, *PROJECTIONS)


@pytest.mark.parametrize("mode", MODES["fixed_point"])
@pytest.mark.parametrize("kind", ALL)
def test_ours_runs_what_the_table_says(kind, mode):
    graph = of_xylo(kind) if mode == "xylo" else one(kind)
    inputs = {"x": np.abs(INPUT["x"])} if mode == "xylo" else INPUT
    if refusal(kind, "fixed_point", mode):
        with pytest.raises(GraphError, match=kind):
            simulate(graph, inputs, mode=mode)
    else:
        assert simulate(graph, inputs, mode=mode).mode == mode


def test_the_mode_of_a_graph_is_that_of_its_chip():
    assert default_mode(of_xylo("xylo"), "fixed_point") == "xylo"
    assert default_mode(one("lif"), "fixed_point") == default_mode(one("lif"), "lava") == "lava"
    assert default_mode(of_xylo("xylo"), "lava") == "lava"  # which then refuses it
    assert default_mode(one("lif"), "snntorch") == "float"


@pytest.mark.parametrize("kind", ALL)
def test_snntorch_runs_what_the_table_says(kind):
    if refusal(kind, "snntorch", "float"):
        with pytest.raises(GraphError, match=kind):
            snntorch_backend.run(one(kind), INPUT)
    else:
        assert snntorch_backend.run(one(kind), INPUT).mode == "float"


@pytest.mark.parametrize("kind", ALL)
def test_lava_says_the_same_of_itself(kind):
    assert bool(refusal(kind, "lava", "lava")) == bool(lava_client.unsupported(one(kind)))


def test_soft_reset_is_ours_alone_and_lava_names_the_way_out():
    remedy = r"population 'n' \(lif_soft\): .*use kind lif or lif_reset \(reset='hard' in the rate route\)"
    (ours,), (lava,) = refusals(one("lif_soft"), "lava", "lava"), lava_client.unsupported(one("lif_soft"))
    assert re.fullmatch(remedy, ours)
    assert re.fullmatch(remedy, lava)
    with pytest.raises(lava_client.LavaUnsupported, match=remedy):
        lava_client.run(one("lif_soft"), INPUT, python=sys.executable)


@pytest.mark.parametrize("kind", ["delta", "sigma_delta"])
def test_the_corrected_models_are_ours_alone(kind):
    graph = one(kind, corrected=1)
    assert lava_client.unsupported(graph)
    assert refusals(graph, "lava", "lava") == (f"population 'n' ({kind}): Lava 0.10 has the residue model only",)
    assert refusals(graph, "fixed_point", "lava") == ()
    assert simulate(graph, INPUT).models["n"] == f"{kind} (corrected)"


@pytest.mark.lava
@pytest.mark.slow
def test_lava_runs_what_the_table_says(lava):
    """Every kind it is said to run, in one worker, with the states of ours."""
    for kind in ALL:
        if not refusal(kind, "lava", "lava"):
            result = compare(lava.run(one(kind), INPUT), simulate(one(kind), INPUT))
            assert result.equal, f"{kind}: {result}"


def test_the_readme_is_current():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m neuro.simulators.support --write"
    assert support_table() in text
    assert kinds_table() in text


def test_an_outdated_readme_is_put_right(tmp_path, monkeypatch, capsys):
    old = "a\n<!-- support -->\nold\n<!-- /support -->\nb\n<!-- kinds -->\n<!-- /kinds -->\nc\n"
    monkeypatch.setattr("neuro.simulators.support.README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(old)
    assert main(["--write"]) == 0
    new = (tmp_path / "README.md").read_text()
    assert "old" not in new
    tables = [
        f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        for name, table in (("support", support_table()), ("kinds", kinds_table()))
    ]
    assert new == f"a\n{tables[0]}\nb\n{tables[1]}\nc\n"
    assert main([]) == 0
    assert support_table() in capsys.readouterr().out
    with pytest.raises(ValueError, match="<!-- kinds -->"):
        with_tables("<!-- support -->\n<!-- /support -->\n")


def test_rows_by_hand():
    lines = support_table().splitlines()
    assert lines[0] == "| kind | fixed_point, lava | fixed_point, chip | fixed_point, xylo | lava, lava | snntorch, float |"
    assert "| lif | yes | yes | no | yes | yes |" in lines
    assert "| lif_refractory | no | yes | no | no | no |" in lines
    assert "| lif_soft | yes | yes | no | no | no |" in lines
    assert "| lif_general | yes | yes | no | no | no |" in lines
    assert "| sigma_delta | residue, corrected | residue, corrected | no | residue | no |" in lines
    assert "| delay_dense | yes | yes | no | yes | no |" in lines
    assert "| sigma | Sigma | a_in | sigma | - |" in kinds_table()


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="backend 'gpu' does not exist; there is: fixed_point, lava, snntorch"):
        check_mode("gpu", "lava")
    with pytest.raises(ValueError, match="backend lava has no mode 'chip'; it has: lava"):
        refusal("lif", "lava", "chip")
    with pytest.raises(ValueError, match="kind 'gru' does not exist"):
        refusal("gru", "lava", "lava")
