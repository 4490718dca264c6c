"""The gate in every loop: a covering selection of the cells, all of them where asked for, and the page that shows them."""

from __future__ import annotations

import io

import pytest
import torch

from sparse_update.library.attach import attach
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.matrix.byhand import by_hand
from tests.sparse_update.library.matrix.cells import AXES, PAIRED, PRECISE, Cell, all_cells, covering
from tests.sparse_update.library.matrix.page import PAGE, load, of, outcomes, page
from tests.sparse_update.library.matrix.pair import Pair
from tests.sparse_update.library.matrix.parts import Tiny, batch, built, config, scaler_of
from tests.sparse_update.library.matrix.run import distance, run

NEEDS = {
    "accelerate": ("accelerate", "hub"),
    "trainer": ("transformers", "hub"),
    "lightning": ("pytorch_lightning", "lightning"),
    "lightning_manual": ("pytorch_lightning", "lightning"),
}


@pytest.mark.parametrize("loop", [loop for loop in AXES["loop"] if loop not in PAIRED])
def test_a_loop_comes_to_what_the_loop_by_hand_does(loop):
    if loop in NEEDS:
        pytest.importorskip(NEEDS[loop][0], reason=f"needs the extra {NEEDS[loop][1]}")
    for cell in covering():
        if cell.loop == loop:
            run(cell)


@pytest.mark.slow
def test_two_processes_come_to_what_the_loop_by_hand_does(tmp_path):
    pair = Pair(str(tmp_path))
    try:
        for cell in covering():
            if cell.loop in PAIRED:
                pair.run(cell)
    finally:
        pair.close()


def test_the_selection_meets_every_value_and_every_pair_of_loop_and_feature():
    cells = covering()
    assert {(c.loop, c.feature) for c in cells} == {(a, b) for a in AXES["loop"] for b in AXES["feature"]}
    assert {c.compile for c in cells} == set(AXES["compile"])
    for axis in ("precision", "gate"):
        for loop in AXES["loop"]:
            assert {getattr(c, axis) for c in cells if c.loop == loop} == set(AXES[axis]), (loop, axis)


@pytest.mark.soak
def test_all_cells():
    bad = [f"{cell}: {outcome}" for cell, outcome in outcomes(all_cells()) if isinstance(outcome, Exception)]
    assert not bad, "\n".join(bad)


def test_the_page_shows_the_results_of_all_cells():
    results = load()
    for cell in all_cells():
        outcome = of(results, cell)
        assert outcome is not None, f"{cell} has no result: make loops"
        assert isinstance(outcome, str) == bool(cell.refusal), cell
        assert isinstance(outcome, str) or outcome < PRECISE[cell.precision], cell
    assert PAGE.read_text(encoding="utf-8") == page(results), "make loops ARGS=--page"


def test_without_a_gate_a_loop_would_come_to_something_else():
    for loop in ("plain", "trainer"):
        if loop == "trainer":
            pytest.importorskip("transformers", reason="needs the extra hub")
        plain = by_hand(Cell(loop, "none", "fp32", "schedule", "")).changed
        for gate in AXES["gate"]:
            gated = by_hand(Cell(loop, "none", "fp32", "schedule", gate)).changed
            assert distance(gated, plain) > 5 * max(PRECISE.values())


def test_a_scaler_before_a_loaded_optimizer_is_refused():
    cell = Cell("plain", "none", "fp16", "resume", "strips")
    x, y = batch(0, False)

    def made():
        model = built(False)
        gate = attach(model, config(cell))
        return model, gate, torch.optim.SGD(gate.parameters(), lr=0.1, momentum=0.9), scaler_of(cell)

    def step(model, gate, optimizer, scaler):
        scaler.scale(gate.loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        gate.step(optimizer)

    first = made()
    for _ in range(2):
        step(*first)
    file = io.BytesIO()
    torch.save([first[1].state_dict(), first[2].state_dict()], file)
    again = made()
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for part, state in zip(again[1:3], states, strict=True):
        part.load_state_dict(state)
    with pytest.raises(GateError, match=r"gate\.adopt\(optimizer\) before or after optimizer\.load_state_dict"):
        step(*again)


def test_parameters_that_took_the_place_of_others_are_the_ones_that_train():
    model = Tiny()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    model.load_state_dict(built(False).state_dict(), assign=True)
    assert [id(p) for p in gate.parameters()] == [id(p) for p in model.parameters()]


def test_an_optimizer_of_parameters_that_were_exchanged_is_refused():
    model = Tiny()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    model.load_state_dict(built(False).state_dict(), assign=True)
    x, y = batch(0, False)
    gate.loss(model(x), y).backward()
    optimizer.step()
    with pytest.raises(GateError, match=r"trains nothing.*gate\.parameters\(\) after that"):
        gate.step(optimizer)
