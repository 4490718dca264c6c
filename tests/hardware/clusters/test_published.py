"""The plan beside published throughput tables: what is held out stays within these errors, and one table sets one constant.

The figures are in ``hardware/throughputs/*.yaml`` with their sources.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import yaml

from hardware.clusters.machines import load_machine
from hardware.clusters.published import calibrated, compare, load_table, tables
from hardware.clusters.step import KERNEL_SHARE
from hardware.datafile import DataFileError, names

HELD_OUT = {
    # name: (rows, largest mean |error|, largest |error|)
    "torchtitan_a100": (8, 0.10, 0.20),
    "torchtitan_h100": (4, 0.16, 0.20),
    "torchtitan_405b": (1, 0.25, 0.25),
    "llama3_405b": (2, 0.05, 0.05),
    "llmfoundry_a100_40gb": (39, 0.10, 0.45),
    "llmfoundry_h100_80gb": (20, 0.22, 0.45),
}


def test_one_table_sets_the_constant_and_all_others_are_held_out() -> None:
    roles = {name: load_table(name).role for name in tables()}
    assert {name for name, role in roles.items() if role == "held_out"} == set(HELD_OUT)
    assert [name for name, role in roles.items() if role == "calibration"] == ["llmfoundry_a100_80gb"]
    found = calibrated(load_table("llmfoundry_a100_80gb"))
    assert found == pytest.approx(tuple(KERNEL_SHARE[end] for end in ("low", "mid", "high")), abs=1.5e-3)


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_table_is_met_within_its_stated_error(name: str) -> None:
    rows, mean, worst = HELD_OUT[name]
    found = compare(load_table(name))
    errors = [row.error for row in found]
    assert len(found) == rows
    assert statistics.mean(map(abs, errors)) <= mean
    assert max(map(abs, errors)) <= worst
    assert all(row.inside for row in found)


def test_the_order_of_torchtitans_rows_is_met_where_they_differ_by_more_than_a_hundredth() -> None:
    for name in ("torchtitan_a100", "torchtitan_h100"):
        rows = compare(load_table(name))
        for one in rows:
            for other in rows:
                if one.row.tokens_per_s_gpu > 1.1 * other.row.tokens_per_s_gpu:
                    assert one.plan.tokens_per_s_gpu("mid") > other.plan.tokens_per_s_gpu("mid")


def test_memory_is_within_a_tenth_of_what_torchtitan_publishes() -> None:
    found = [row.memory_error for row in compare(load_table("torchtitan_h100"))]
    assert len(found) == 4
    assert all(error is not None and abs(error) < 0.1 for error in found)


@pytest.mark.parametrize("name", names("clusters"))
def test_every_number_of_a_machine_has_a_source_and_a_method(name: str) -> None:
    machine = load_machine(name)
    for value in machine.values.values():
        assert len(value.source) > 10
        assert value.low <= value.mid <= value.high


def _machine(tmp_path: Path, **change: object) -> Path:
    content = yaml.safe_load((Path(__file__).parents[3] / "hardware/clusters/h100_80gb.yaml").read_text())
    content["name"] = "mine"
    content["values"]["nic_gb_s"] |= change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_machine_of_ones_own_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    assert load_machine(_machine(tmp_path, value=45, low=40)).at("nic_gb_s", "mid") == 45
    with pytest.raises(DataFileError, match="nic_gb_s: out of order: low 60"):
        load_machine(_machine(tmp_path, low=60))
    with pytest.raises(DataFileError, match="method: 'guessed' is not one of"):
        load_machine(_machine(tmp_path, method="guessed"))
    with pytest.raises(FileNotFoundError, match="shipped names: a100_40gb"):
        load_machine("tpu")
