"""Joules that meters saw of training runs, from the meter to record, table and TensorBoard; 0 J is never made up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.comparison.accounts import measured_energy
from experiments.comparison.collection import collect
from experiments.comparison.overview import columns, rows
from experiments.comparison.record import Deployment
from experiments.views.blocks import threshold_blocks
from experiments.views.tables import table
from experiments.views.tracking import hparam_metrics, training_energy_markdown
from hardware import Counts, break_even, load_profile, standings
from hardware.meters.meter import Reading

GPU = Reading(120.0, "NVML: GPU 0, Fake", 20.0, 0.6, None, idle_w=2.5)
CPU = Reading(80.0, "RAPL: package-0", 20.0, 0.004, None, idle_w=1.0)
LOST = Reading(None, "RAPL", 20.0, None, "no powercap folder")


def test_all_meters_some_and_none_by_hand() -> None:
    whole = measured_energy([GPU, CPU])
    assert (whole["energy_j"], whole["energy_known_j"], whole["energy_reason"]) == (200.0, 200.0, None)
    assert whole["energy_above_idle_j"] == pytest.approx(200 - 2.5 * 20 - 1.0 * 20)
    assert [(r["window_s"], r["resolution_j"]) for r in whole["energy_readings"]] == [(20.0, 0.6), (20.0, 0.004)]
    part = measured_energy([GPU, LOST])
    assert (part["energy_j"], part["energy_known_j"], part["energy_above_idle_j"]) == (None, 120.0, None)
    assert part["energy_reason"] == "not measured: RAPL: no powercap folder"
    none = measured_energy([LOST])
    assert [none[key] for key in ("energy_j", "energy_known_j", "energy_above_idle_j")] == [None] * 3
    resumed = measured_energy([GPU, CPU], resumed=True)
    assert (resumed["energy_j"], resumed["energy_known_j"]) == (None, None)
    assert "resumed" in resumed["energy_reason"]
    for record in (whole, part, none, resumed):
        assert 0 not in json.loads(json.dumps(record)).values()


def test_text_for_people_shows_both_sides_of_idle() -> None:
    text = training_energy_markdown(measured_energy([GPU, CPU]))
    assert text.startswith("Training energy: 200 J, measured")
    assert "| NVML: GPU 0, Fake | 120 | 70 | 20 | 0.6 |" in text
    part = training_energy_markdown(measured_energy([GPU, LOST]))
    assert "RAPL: no powercap folder" in part
    assert "at least 120 J" in part
    without = Reading(5.0, "RAPL: package-0", 2.0, 0.1, None)
    assert "| RAPL: package-0 | 5 | not measured | 2 | 0.1 |" in training_energy_markdown(measured_energy([without]))
    nothing = training_energy_markdown(measured_energy([LOST]))
    assert nothing == "Training energy: not measured: RAPL: no powercap folder"
    assert hparam_metrics(measured_energy([LOST]))["energy_j"] is None
    assert hparam_metrics(measured_energy([GPU, LOST]))["energy_j"] is None


def run(folder: Path, arm: str, seed: int, energy: dict[str, Any]) -> None:
    place = folder / f"{arm}-s{seed}"
    place.mkdir()
    info = {"schema": 1, "kind": "train", "status": "finished", "stream": "clean", "arm": arm, "seed": seed}
    result: dict[str, Any] = dict.fromkeys(("bits_per_byte", "tokens", "flops", "reference_s", "wall_s", "peak_bytes"), 1.0)
    result |= {"loss_nats": 2.0 + 0.1 * seed, "budget_reference_s": 1.0, **energy}
    (place / "run.json").write_text(json.dumps(info))
    (place / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("readings", "cell"),
    [
        ([[GPU, CPU]], "200 J"),
        ([[GPU, CPU], [CPU]], "140 J"),
        ([[GPU, LOST]], ">= 120 J"),
        ([[GPU, LOST], [CPU, LOST]], ">= 100 J"),
        ([[GPU, LOST], [LOST]], "not measured"),
        ([[GPU, CPU], [LOST]], "not measured"),
        ([[LOST]], "not measured"),
    ],
)
def test_a_cell_of_the_table(tmp_path: Path, readings: list[list[Reading]], cell: str) -> None:
    for seed, seen in enumerate(readings):
        run(tmp_path, "dense", seed, measured_energy(seen))
    comparison = collect([tmp_path])
    assert comparison.excluded == ()
    found = rows(comparison.streams["clean"])
    column = next(column for column in columns(found) if column.header == "measured energy")
    assert [column.text(row) for row in found] == [cell]
    assert cell in table(comparison)
    assert found[0]["energy_j"] != 0


def test_break_even_and_thresholds_are_printed() -> None:
    counts = [Counts("mlp", 10, 577, 10, 4, 6, 1000, 1000, True, 8)]
    chip = load_profile("loihi1_davies2018")
    pairs = [break_even(counts, chip, load_profile(f"digital45_int8_{where}")).to_dict() for where in ("sram", "dram")]
    record = {"break_even": pairs, "standings": [asdict(standing) for standing in standings(counts)]}
    density, published = threshold_blocks(Deployment("here", "clean", "dense", 0, record))
    # by hand in tests/hardware/energy/test_breakeven.py: 57.7 %, 9.1 %, 5.12 times, 3.75 pJ
    row = dict(zip(density.header, density.rows[0], strict=True))
    assert (row["density"], row["wins below"], row["energy"]) == ("57.7%", "9.1%", "5.12 x")
    assert row["verdict"] == "undecided"
    assert "to cost 3.75 pJ" in row["to break even"]
    assert density.rows[1][6] == "chip wins"
    assert [line[2] for line in published.rows] == ["above", "within", "below"]
    assert all("graded" in line[5] for line in published.rows)
    assert threshold_blocks(Deployment("here", "clean", "dense", 0, {})) == []
