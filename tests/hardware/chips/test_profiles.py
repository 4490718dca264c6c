"""Every shipped profile and chip loads, says where each figure comes from, and a wrong file is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import hardware
from hardware import DataFileError, list_chips, list_profiles, load_chip, load_profile
from hardware.chips.chip import METHODS as CHIP_METHODS
from hardware.energy.profile import METHODS

PROFILES = Path(hardware.__file__).parent / "profiles"
CHIPS = Path(hardware.__file__).parent / "chips"

# Published figures in pJ, typed from the sources: Davies 2018 Table 2, and SANA-FE's loihi.yaml (sums written out).
DAVIES = {"synapse": 23.6, "neuron_active": 81.0, "neuron_inactive": 52.0, "message": 1.7 + 2 * 3.5}
SANAFE = {"synapse": 35.5, "neuron_active": 51.2 + 21.6 + 69.3, "neuron_inactive": 51.2, "message": 111 + 2 * 3.6}


@pytest.mark.parametrize("name", list_profiles())
def test_every_coefficient_has_source_method_and_date(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source
    for term, c in profile.coefficients.items():
        assert c.source, term
        assert len(c.date) == 10, term
        if c.mid is None:
            assert c.method == "unknown"
            assert c.note, term
        else:
            assert c.method in METHODS
            assert c.low is not None
            assert c.high is not None
            assert c.low.value <= c.mid.value <= c.high.value


def test_the_shipped_set_has_no_loihi2() -> None:
    assert list_profiles() == (
        "digital45_fp16_dram", "digital45_fp16_sram", "digital45_fp32_dram", "digital45_fp32_sram", "digital45_int8_dram",
        "digital45_int8_sram", "gpu_h100_sheet", "loihi1_davies2018", "loihi1_sanafe",
    )  # fmt: skip
    assert not any("loihi2" in name for name in list_profiles())


@pytest.mark.parametrize("term", DAVIES)
@pytest.mark.parametrize(("name", "own"), [("loihi1_davies2018", DAVIES), ("loihi1_sanafe", SANAFE)])
def test_loihi1_interval_spans_both_sets_widened(name: str, own: dict[str, float], term: str) -> None:
    c = load_profile(name).coefficients[term]
    assert c.low is not None
    assert c.mid is not None
    assert c.high is not None
    both = (DAVIES[term], SANAFE[term])
    assert c.mid.to("pJ") == pytest.approx(own[term])
    assert c.low.to("pJ") <= min(both) * (1 - 0.117) * (1 + 1e-9)
    assert c.high.to("pJ") >= max(both) * (1 + 0.117) * (1 - 1e-9)


def _edited(tmp_path: Path, source: Path, **changes: object) -> Path:
    """A copy of a data file with dotted entries replaced; a value of ``...`` removes the entry."""
    content = yaml.safe_load(source.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        spot = content
        for key in parents:
            spot = spot[key]
        if value is ...:
            del spot[last]
        else:
            spot[last] = value
    path = tmp_path / source.name
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "loihi1_sanafe.yaml: unknown key colour; known keys: schema, name"),
        ({"coefficients__synapse__hihg": 1}, "loihi1_sanafe.yaml: synapse: unknown key hihg"),
        ({"coefficients__mac": {}}, "loihi1_sanafe.yaml: coefficients: unknown key mac"),
        ({"coefficients__message": ...}, "loihi1_sanafe.yaml: coefficients: missing key message"),
        ({"coefficients__synapse__source": ...}, "loihi1_sanafe.yaml: synapse: missing key source"),
        ({"coefficients__synapse__source": " "}, "loihi1_sanafe.yaml: synapse: source: expected a text"),
        ({"coefficients__synapse__method": "guessed"}, "synapse: method: 'guessed' is not one of simulated, fitted"),
        ({"coefficients__synapse__date": "last year"}, "synapse: date: expected a date YYYY-MM-DD"),
        ({"coefficients__synapse__unit": "ns/synop"}, "synapse: unit 'ns' is time, energy is needed"),
        ({"coefficients__synapse__unit": "pJ/update"}, "synapse: unit 'pJ/update' must be energy per synop"),
        ({"coefficients__static__unit": "pJ/chip"}, "static: unit 'pJ' is energy, power is needed"),
        ({"coefficients__synapse__low": 36.0}, "synapse: interval out of order: low 36.0, value 35.5"),
        ({"coefficients__synapse__value": -1}, "synapse: value: expected a finite number >= 0, got -1"),
        ({"coefficients__synapse__high": float("inf")}, "synapse: high: expected a finite number >= 0, got inf"),
        ({"coefficients__synapse": {"value": None}}, "synapse: missing key reason, source, date"),
        ({"schema": 2}, "schema 2 is not known"),
        ({"name": "other"}, "name 'other' differs from the file's name 'loihi1_sanafe'"),
        ({"costs": "both"}, "costs: 'both' is not one of spiking, dense"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = _edited(tmp_path, PROFILES / "loihi1_sanafe.yaml", **changes)
    with pytest.raises(DataFileError) as caught:
        load_profile(path)
    assert message in str(caught.value)


def test_an_unknown_coefficient_makes_a_lower_bound(tmp_path: Path) -> None:
    unknown = {"value": None, "reason": "nobody measured it", "source": "none", "date": yaml.safe_load("2026-11-21")}
    profile = load_profile(_edited(tmp_path, PROFILES / "loihi1_sanafe.yaml", coefficients__message=unknown))
    counts = hardware.Counts("one", 1, 10, 2, 1, 1, 20, 20, False, 1)
    report = hardware.account([counts], profile)
    assert "message: nobody measured it" in report.unknown
    assert report.lower_bound
    assert "message" not in report.by_term()


def test_files_that_are_no_mapping_or_repeat_a_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schema: 1\nschema: 1\n")
    with pytest.raises(DataFileError, match="key 'schema' appears twice"):
        load_profile(path)
    path.write_text("- 1\n")
    with pytest.raises(DataFileError, match="expected a mapping at the top, got list"):
        load_profile(path)
    path.write_text("a: [1\n")
    with pytest.raises(DataFileError, match="not readable as YAML"):
        load_profile(path)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="no name 'loihi2'; shipped names: digital45_fp16_dram"):
        load_profile("loihi2")
    with pytest.raises(FileNotFoundError, match="no name 'loihi3'; shipped names: loihi1, loihi2"):
        load_chip("loihi3")
    with pytest.raises(FileNotFoundError, match=r"no file 'here/mine\.yaml'"):
        load_profile("here/mine.yaml")


@pytest.mark.parametrize("name", list_chips())
def test_every_limit_has_source_method_and_date(name: str) -> None:
    chip = load_chip(name)
    assert len(chip.provenance) == 13
    for field, where in chip.provenance.items():
        assert hasattr(chip, field)
        assert where.source
        assert where.method in CHIP_METHODS
        assert len(where.date) == 10


def test_chip_figures_against_the_papers() -> None:
    one, two = load_chip("loihi1"), load_chip("loihi2")
    # Davies 2018: 128 cores of 1,024 neurons are the paper's 131,072 neurons; spikes are binary.
    assert one.cores * one.neurons_per_core == 131_072
    assert (one.graded, one.payload_bits) == (False, 1)
    # Intel's Loihi 2 brief: graded payloads up to 32 bits, 128 cores, 128 KB for synapses.
    assert (two.graded, two.payload_bits, two.cores) == (True, 32, 128)
    assert two.synaptic_memory_bytes_per_core == 128 * 1024
    assert two.neurons_per_core <= 8192
    assert one.weight_bits == two.weight_bits == 8
    assert two.u_bits == two.v_bits == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limits__speed": 1}, "loihi1.yaml: limits: unknown key speed"),
        ({"limits__cores": ...}, "loihi1.yaml: limits: missing key cores"),
        ({"limits__cores__value": 0}, "loihi1.yaml: cores: expected a number above zero, got 0"),
        ({"limits__cores__value": 1.5}, "loihi1.yaml: cores: expected a whole number, got 1.5"),
        ({"limits__graded__value": 1}, "loihi1.yaml: graded: expected true or false, got 1"),
        ({"limits__payload_bits__value": 8}, "payload_bits is 8 on a chip without graded payloads; 1 needed"),
        ({"limits__cores__source": ...}, "loihi1.yaml: cores: missing key source"),
        ({"limits__cores__method": "heard"}, "cores: method: 'heard' is not one of published, code, inferred"),
        ({"schema": 0}, "schema 0 is not known"),
        ({"name": "mine"}, "name 'mine' differs"),
    ],
)
def test_a_wrong_chip_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataFileError) as caught:
        load_chip(_edited(tmp_path, CHIPS / "loihi1.yaml", **changes))
    assert message in str(caught.value)
