"""Error bounds of look-up tables, what a layer needs of a chip, and the matrix in the README."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hardware
from hardware.chips.chip import list_chips, load_chip
from hardware.placement import DoesNotFit
from neuro.analysis import matrix
from neuro.analysis.compatibility import NothingToMap, analyse
from neuro.analysis.fit import Fitter
from neuro.analysis.lookup import FUNCTIONS, Table


@settings(max_examples=40, deadline=None)
@given(
    function=st.sampled_from(sorted(FUNCTIONS)),
    entries=st.sampled_from([2, 5, 16, 256, 1000]),
    reach=st.sampled_from([0.5, 4.0, 8.0, 20.0]),
    seed=st.integers(0, 10**6),
)
def test_the_bound_holds(function: str, entries: int, reach: float, seed: int) -> None:
    table = Table(entries, reach)
    x = (torch.rand(4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1) * reach
    error = (table.values(function, x) - FUNCTIONS[function][0](x)).abs()
    assert float(error.max()) <= table.error_bound(function)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_the_bound_is_not_idle_and_shrinks_with_entries(function: str) -> None:
    table = Table(256, 8.0)
    x = torch.linspace(-8, 8, 1_000_003, dtype=torch.float64)
    evaluate, slope = FUNCTIONS[function]
    assert table.error_bound(function) < 1.06 * float((table.values(function, x) - evaluate(x)).abs().max())
    assert Table(4096, 8.0).error_bound(function) < table.error_bound(function) / 10
    rise = ((evaluate(x[1:]) - evaluate(x[:-1])) / (x[1:] - x[:-1])).abs().max()
    assert float(rise) <= slope * (1 + 1e-6)


def test_the_report_carries_the_bound() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.zeros(2, 4)
    row = analyse(model, x).operations[1]
    assert (row.verdict, row.error_bound) == ("approximate", Table().error_bound("gelu"))
    assert row.bound_of == "absolute, x in -8..8, 256 entries"
    finer = analyse(model, x, table=Table(1024, 4.0)).operations[1]
    assert finer.error_bound == Table(1024, 4.0).error_bound("gelu")
    assert "x in -4..4, 1024 entries" in analyse(model, x, table=Table(1024, 4.0)).markdown()


def test_bad_tables() -> None:
    with pytest.raises(ValueError, match="at least 2 entries"):
        Table(1, 8.0)
    with pytest.raises(ValueError, match="positive reach"):
        Table(16, 0.0)
    with pytest.raises(ValueError, match="no table for 'exp'"):
        Table().error_bound("exp")


def test_a_layer_too_wide_for_a_core_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(5000, 8), nn.ReLU(), nn.Linear(8, 8)), torch.zeros(2, 5000)
    report = analyse(model, x, "loihi1")
    wide = report.operations[0]
    assert (wide.verdict, wide.runs_on, wide.limit, wide.need, wide.have) == ("host", "host", "axon_in", 5000, 4096)
    assert "does not fit: axon_in 5,000 of 4,096" in report.table()
    assert "partial sums need graded messages (Loihi 2)" in wide.remedy
    assert report.mapped == ("2",)
    assert report.pairs == ()
    split = analyse(model, x, "loihi2").operations[0]  # partial sums are graded messages
    assert (split.verdict, split.limit, split.have) == ("native", "pool", 20000)
    assert split.need is not None
    assert split.need > split.have
    assert split.cores > 1


def test_need_is_that_of_the_placement() -> None:
    fit = Fitter(load_chip("loihi2"), graded=True).linear(256, 1024)
    # 256 axons, each 1,024 synapses of 8 + 12 bits and a prefix of 10: 321 words of 64 bits
    assert (fit.limit, fit.need, fit.have) == ("synapse_words", 256 * 321, 16000)
    assert fit.cores == 6


def small_chip(folder: Path) -> Path:
    """Loihi 2 with a synaptic memory of three words."""
    text = (Path(hardware.__file__).parent / "chips" / "loihi2.yaml").read_text(encoding="utf-8")
    before, after = text.split("      synapse_words:\n        value: 16000", 1)
    path = folder / "tiny.yaml"
    path.write_text((before + "      synapse_words:\n        value: 3" + after).replace("name: loihi2\n", "name: tiny\n"))
    return path


def test_a_chip_that_is_too_small(tmp_path: Path) -> None:
    model, x = nn.Linear(64, 64), torch.zeros(2, 64)
    with pytest.raises(NothingToMap, match=r"map to tiny.*linear.*Limits: \(root\): synapse_words \d+ of 3"):
        analyse(model, x, small_chip(tmp_path))
    with pytest.raises(DoesNotFit, match=r"cores .* of 128.*more chips"):
        analyse(nn.Linear(3000, 3000), torch.zeros(1, 3000), chips=1)
    report = analyse(nn.Linear(3000, 3000), torch.zeros(1, 3000), chips=2)
    assert 128 < report.cores <= 256
    assert f"{report.cores:,} cores, 2 chips" in report.table()
    with pytest.raises(ValueError, match=r"chip 'loihi3' is unknown; known: loihi1, loihi2"):
        analyse(model, x, "loihi3")
    with pytest.raises(ValueError, match="route 'fast' is unknown; known: graded, sigma_delta, rate"):
        analyse(model, x, route="fast")


def test_the_matrix_in_the_readme_is_current() -> None:
    text = matrix.README.read_text(encoding="utf-8")
    assert matrix.with_table(text) == text, "run python -m neuro.analysis.matrix --write"


def test_the_matrix_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lines = matrix.compat_table().splitlines()
    assert lines[0] == "| operation | loihi1, rate route | loihi2, graded route |"
    assert tuple(list_chips()) == ("loihi1", "loihi2")
    assert "| linear layer, 8,192 to 64 | host: axon_in 8,192 of 4,096 |" in "\n".join(lines)
    assert "| ReLU of an MLP pair | after transform, on chip | after transform, on chip |" in lines
    assert "| attention scores, attention softmax, attention x value | host | host |" in lines
    assert all(line.count("|") == 4 for line in lines)
    gelu = next(line for line in lines if line.startswith("| GELU |"))
    assert f"{Table().error_bound('gelu'):.2g}" in gelu
    monkeypatch.setattr(matrix, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("a\n<!-- compat -->\nold\n<!-- /compat -->\nb\n")
    assert matrix.main(["--write"]) == 0
    assert (tmp_path / "README.md").read_text() == "a\n<!-- compat -->\n" + "\n".join(lines) + "\n<!-- /compat -->\nb\n"
    assert matrix.main([]) == 0
    assert capsys.readouterr().out.strip() == "\n".join(lines)
    with pytest.raises(ValueError, match="<!-- compat -->"):
        matrix.with_table("nothing here")
