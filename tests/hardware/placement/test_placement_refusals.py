"""What does not fit is refused with the limit and a remedy that works; wrong input and wrong chip files are named."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from hardware import DataFileError, load_chip
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, place
from tests.hardware.placement.chains import CHIP_FOLDER, CHIPS, chain, check


def test_too_few_chips_names_the_limit_and_remedies_that_work():
    demands = chain(1024, 4096, 1024)
    with pytest.raises(DoesNotFit) as caught:
        place(demands, "loihi2", 1)
    failure = caught.value
    assert (failure.binding.resource, failure.binding.limit) == ("cores", 128)
    assert failure.binding.used == len(place(demands, "loihi2").cores) == 202
    assert any(text.startswith("index-free synapses (82 cores on 1 chip)") for text in failure.remedies)
    assert any(text.startswith("more chips (202 cores on 2 chips)") for text in failure.remedies)
    assert len(place(demands, "loihi2", 1, encoding="dense").cores) == 82
    assert place(demands, "loihi2", 2).chips == 2


def test_weight_bits_are_offered_where_they_help():
    demands = chain(1024, 4900)
    with pytest.raises(DoesNotFit) as caught:
        place(demands, "loihi2", 1, budget="inferred-2023")
    offers = [text for text in caught.value.remedies if "-bit weights" in text]
    assert offers
    bits = int(offers[0].split("-")[0])
    placement = place(chain(1024, 4900, bits=bits), "loihi2", 1, budget="inferred-2023")
    assert offers[0] == f"{bits}-bit weights ({len(placement.cores)} cores on 1 chip)"


def test_a_layer_asked_for_on_too_few_cores():
    demands = [
        LayerDemand("in", 256, on_chip=False),
        LayerDemand("blocks.3.fc1", 700, (Connection("in", 256),), cores=1),
    ]
    with pytest.raises(DoesNotFit, match=r"fc1 of block 3.*split fc1 of block 3 over 4 cores") as caught:
        place(demands, "loihi2")
    assert caught.value.binding.resource == "synapse_words"
    assert len(place([demands[0], LayerDemand("blocks.3.fc1", 700, demands[1].connections, cores=4)], "loihi2").cores) == 4


def test_sharing_cores():
    demands = chain(16, *[20] * 10)
    assert len(place(demands, "loihi2").cores) == 10
    shared = place(demands, "loihi2", share=True)
    check(shared, demands)
    assert len(shared.cores) == 2  # 8 neuron groups to a core
    with pytest.raises(DoesNotFit) as caught:
        place(chain(16, *[20] * 130), "loihi2", 1)
    assert caught.value.remedies[0] == "let layers share cores (17 cores on 1 chip)"


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (LayerDemand("l", 4, (Connection("in", 4, weight_bits=9),)), "weight_bits 9 of 8.*8-bit weights in l"),
        (LayerDemand("l", 4, (Connection("in", 4, max_delay=63),)), "max_delay 63 of 62.*delays up to 62 in l"),
        (LayerDemand("l", 4, (Connection("in", 4),), payload_bits=33), "payload_bits 33 of 32.*messages of 32 bits from l"),
    ],
)
def test_what_no_core_holds(demand, message):
    with pytest.raises(DoesNotFit, match=message):
        place([LayerDemand("in", 4, on_chip=False), demand], "loihi2")


def test_loihi_1_has_neither_graded_messages_nor_programmable_neurons():
    source = LayerDemand("in", 4, on_chip=False)
    with pytest.raises(DoesNotFit, match=r"payload_bits 8 of 1.*binary spikes from l; a chip with graded messages: loihi2"):
        place([source, LayerDemand("l", 4, (Connection("in", 4),), payload_bits=8)], "loihi1")
    with pytest.raises(DoesNotFit, match="programmable_neurons 4 of 0"):
        place([source, LayerDemand("l", 4, (Connection("in", 4),), programmable=True)], "loihi1")


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Connection("in", 0), "inputs is 0; 1 or more"),
        (lambda: Connection("in", 2.5), "inputs is 2.5; a whole number"),
        (lambda: Connection("in", 2, encoding="rle"), "encoding 'rle' is unknown; known: dense, sparse"),
        (lambda: Connection("in", 2, mask=np.ones((3, 4), bool)), r"mask is bool \(3, 4\); bool \(neurons, 2\)"),
        (lambda: Convolution("in", (4, 4, 3), 4, (3, 3), groups=2), "2 groups do not divide 3 channels in and 4 out"),
        (lambda: Convolution("in", (2, 2, 1), 4, (3, 3)), "kernel .3, 3. is larger than the padded input"),
        (lambda: LayerDemand("l", 5, shape=(2, 2, 1)), r"shape \(2, 2, 1\) does not hold 5 neurons"),
        (lambda: LayerDemand("l", 5, (Connection("l", 5),), on_chip=False), "nothing can arrive at it"),
        (lambda: LayerDemand("l", 5, rate=(0.5,)), "1 rates for 5 neurons"),
        (lambda: LayerDemand("l", 5, rate=math.nan), "finite number of messages"),
        (lambda: place([], "loihi2"), "nothing to place"),
        (lambda: place([LayerDemand("l", 5), LayerDemand("l", 5)], "loihi2"), "two layers are named 'l'"),
        (lambda: place([LayerDemand("l", 5, (Connection("x", 5),))], "loihi2"), "source 'x' does not exist"),
        (lambda: place([LayerDemand("l", 5, (Connection("l", 6),))], "loihi2"), "6 inputs from 'l', which has 5 neurons"),
        (lambda: place(chain(4, 4), "loihi2", 0), "chips is 0; a whole number from 1"),
        (lambda: place(chain(4, 4), "loihi2", budget="intel"), "no budget 'intel'; it has: inferred, inferred-2023, brief"),
        (lambda: place(chain(4, 4), "loihi2", split="best"), "split 'best' is unknown; known: fewest, compiler"),
        (lambda: place(chain(4, 4), "loihi2", encoding="rle"), "encoding 'rle' is unknown"),
    ],
)
def test_wrong_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_chip():
    with pytest.raises(FileNotFoundError, match=r"loihi3.*shipped names: loihi1, loihi2"):
        place(chain(4, 4), "loihi3")


# --- data and report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chip", "budget"), CHIPS)
def test_every_value_of_a_budget_says_where_it_comes_from(chip, budget):
    held = load_chip(chip).budgets[budget]
    assert set(held.limits) <= set(held.provenance)
    assert all(where.source and where.method in ("published", "code", "inferred") for where in held.provenance.values())
    if chip == "loihi2":
        assert "inferred" in held.title
        assert held.inferred
        assert any("not stated by the maker" in note for note in place(chain(4, 4), chip, budget=budget).notes)
    else:
        assert not held.inferred


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("rule: {value: netx", "rule: {value: intel", "rule: 'intel' is not one of nengo, nxtf, netx"),
        ("neurons: {value: 10", "neurons: {value: -1", "neurons: expected a whole number above zero, got -1"),
        ("neurons: {value: 10", "threads: {value: 10", "limits: unknown key threads"),
        ("index_fields: {value: [12]", "index_fields: {value: 12", "expected a list of widths in bits, got 12"),
        (
            "method: inferred, date: 2026-11-21}",
            "method: guessed, date: 2026-11-21}",
            "'guessed' is not one of published, code, inferred",
        ),
        (", date: 2026-11-21", "", "missing key date"),
    ],
)
def test_a_wrong_budget_is_refused(tmp_path, before, after, message):
    where = "source: s, method: inferred, date: 2026-11-21}"
    settings_text = "".join(
        f"      {key}: {{value: {value}, {where}\n"
        for key, value in {
            "rule": "netx",
            "encoding": "sparse",
            "entry_synapses": 0,
            "index_fields": "[12]",
            "weight_fields": "[8]",
            "delay_bits": 6,
            "max_delay": 62,
        }.items()
    )
    limits = "".join(f"      {key}: {{value: 10, {where}\n" for key in ("neurons", "synapse_words"))
    text = (CHIP_FOLDER / "loihi2.yaml").read_text(encoding="utf-8").split("# How one core")[0].replace("loihi2", "mine", 1)
    text = text.replace("name: loihi2", "name: mine")
    text += f"budgets:\n  only:\n    title: t\n    settings:\n{settings_text}    limits:\n{limits}"
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert place(chain(1, 1), path).budget == "only"
    with pytest.raises(DoesNotFit, match="more chips"):
        place(chain(1, 4000), path, 1)
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(DataFileError, match=re.escape(message)):
        load_chip(path)


def test_a_chip_without_budgets_places_nothing(tmp_path):
    text = (CHIP_FOLDER / "loihi2.yaml").read_text(encoding="utf-8").split("# How one core")[0]
    (tmp_path / "mine.yaml").write_text(text.replace("name: loihi2", "name: mine"), encoding="utf-8")
    assert not load_chip(tmp_path / "mine.yaml").budgets
    with pytest.raises(ValueError, match="chip 'mine' has no budgets"):
        place(chain(1, 1), tmp_path / "mine.yaml")


def test_output_axons_that_never_fit_end_in_a_clear_refusal():
    """4,000 recurrent neurons take 245 cores by their synapses; on two chips, however small the parts, too much crosses."""
    demands = [LayerDemand("in", 4, on_chip=False), LayerDemand("r", 4000, (Connection("in", 4), Connection("r", 4000)))]
    with pytest.raises(DoesNotFit, match=r"fewer receivers of r") as caught:
        place(demands, "loihi1")
    assert caught.value.binding.resource in ("axon_out", "axon_out_far")
    assert caught.value.binding.used > caught.value.binding.limit


def test_the_report_says_it_all():
    placement = place(chain(784, 128, 10, names=("blocks.0.fc1", "out")), "loihi2")
    text = str(placement)
    assert "4 of 128 cores on 1 chip" in text
    assert "synapse_words 32,144 of 16,000 (200.90 %)" in text
    document = placement.to_dict()
    assert document["cores_used"] == 4
    assert document["cores"][0]["used"]["synapse_words"] == [10976, 16000]
    assert document["layers"][0]["cores"] == [0, 1, 2]
