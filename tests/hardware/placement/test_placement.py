"""Placement: no limit is ever exceeded, everything is placed once, work is balanced, traffic is low, errors help."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import hardware
from hardware import DataFileError, load_chip
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, Placement, place
from hardware.placement.cost import axon_words
from hardware.placement.traffic import Edges, assign, crossing

CHIP_FOLDER = Path(hardware.__file__).parent / "chips"
CHIPS = [("loihi1", "nxtf"), ("loihi1", "nengo"), ("loihi2", "inferred"), ("loihi2", "inferred-2023"), ("loihi2", "brief")]


def chain(*sizes: int, bits: int = 8, names: tuple[str, ...] = ()) -> list[LayerDemand]:
    """An input on the host and dense layers."""
    found = [LayerDemand("in", sizes[0], on_chip=False)]
    for number, size in enumerate(sizes[1:]):
        name = names[number] if names else f"l{number}"
        found.append(LayerDemand(name, size, (Connection(found[-1].name, found[-1].neurons, bits),)))
    return found


def check(placement: Placement, demands: list[LayerDemand]) -> None:
    """What holds for every placement."""
    chip = load_chip(placement.chip)
    limits = chip.budgets[placement.budget].limits
    for core in placement.cores:
        assert set(core.used) == set(limits) - ({"axon_out", "axon_out_far"} - set(core.used))
        for name, limit in core.used.items():
            assert limit.limit == limits[name]
            assert 0 <= limit.used <= limit.limit, (core.number, name, limit)
        assert 0 <= core.slot < chip.cores
    if "axon_out" in limits:
        assert all({"axon_out", "axon_out_far"} <= set(core.used) for core in placement.cores)
    assert len({(core.chip, core.slot) for core in placement.cores}) == len(placement.cores)
    assert max(Counter(core.chip for core in placement.cores).values()) <= chip.cores
    assert {core.chip for core in placement.cores} == set(range(placement.chips))
    for demand in demands:
        if not demand.on_chip:
            continue
        # Every neuron is on one core, and every synapse of it is once on a core.
        mine = [part for core in placement.cores for part in core.parts if part.layer == demand.name]
        owned = np.concatenate([part.indices(demand.box) for part in mine if part.role != "partial"])
        assert sorted(owned.tolist()) == list(range(demand.neurons))
        assert min(placement.core_of(demand.name)) >= 0
        for number, connection in enumerate(demand.connections):
            seen = np.zeros(demand.neurons, dtype=np.int64)
            for part in mine:
                if part.role != "sum":
                    low, high = part.inputs[number] if part.inputs is not None else (0, connection.units)
                    seen[part.indices(demand.box)] += high - low
            assert (seen == connection.units).all()


@st.composite
def networks(draw: st.DrawFn) -> list[LayerDemand]:
    found = [LayerDemand("in", draw(st.integers(1, 3000)), on_chip=False)]
    for number in range(draw(st.integers(1, 4))):
        source = found[-1]
        kind = draw(st.sampled_from(["dense", "sparse", "conv", "recurrent"]))
        bits = draw(st.integers(1, 8))
        delay = draw(st.sampled_from([0, 0, 5, 62]))
        name = f"l{number}"
        if kind == "conv":
            width, height, channels = draw(st.integers(3, 20)), draw(st.integers(3, 20)), draw(st.integers(1, 16))
            groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
            between = LayerDemand(
                f"{name}_in",
                width * height * channels,
                (Connection(source.name, source.neurons, bits),),
                draw(st.just((width, height, channels))),
            )
            conv = Convolution(
                between.name,
                between.box,
                groups * draw(st.integers(1, 12)),
                (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
                groups=groups,
                weight_bits=bits,
            )
            found += [between, LayerDemand(name, math.prod(conv.output_shape), (conv,))]
            continue
        size = draw(st.integers(1, 1500))
        mask = None
        if kind == "sparse":
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            rows = np.linspace(0, draw(st.floats(0.05, 1)), size)[:, None]
            mask = rng.random((size, source.neurons)) < rows
        connections = [Connection(source.name, source.neurons, bits, max_delay=delay, mask=mask)]
        if kind == "recurrent":
            connections.append(Connection(name, size, bits))
        found.append(LayerDemand(name, size, tuple(connections)))
    return found


@pytest.mark.parametrize(("chip", "budget"), CHIPS)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking would take minutes
@given(demands=networks(), share=st.booleans(), split=st.sampled_from(["fewest", "compiler"]))
def test_no_placement_exceeds_a_limit(chip, budget, demands, share, split):
    try:
        placement = place(demands, chip, budget=budget, share=share, split=split)
    except DoesNotFit as failure:
        refused = failure.binding
    else:
        check(placement, demands)
        return
    # Only output axons may be too few here: a recurrent layer needs neurons x cores of them.
    assert chip == "loihi1"
    assert refused.resource in ("axon_out", "axon_out_far")
    assert refused.used > refused.limit


def test_the_property_is_not_empty_some_networks_take_several_cores_and_chips():
    demands = chain(4096, 4096, 64)
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert len(placement.cores) == 456 + 8
    assert placement.chips == 4


# --- splits ----------------------------------------------------------------------------------------------------------


def test_outputs_are_split_evenly():
    placement = place(chain(784, 128), "loihi2")
    assert [part.neurons for core in placement.cores for part in core.parts] == [43, 43, 42]
    assert placement.layers[0].imbalance == pytest.approx(43 * 3 / 128)
    assert placement.layers[0].binding.resource == "synapse_words"
    assert (placement.layers[0].binding.used, placement.layers[0].binding.limit) == (32144, 16000)


def test_synaptic_operations_are_balanced_where_neurons_differ():
    rng = np.random.default_rng(0)
    mask = rng.random((1000, 1000)) < np.linspace(0.02, 1, 1000)[:, None]
    demands = [LayerDemand("in", 1000, on_chip=False), LayerDemand("l", 1000, (Connection("in", 1000, mask=mask),))]
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert len(placement.cores) > 5
    assert placement.layers[0].imbalance < 1.02
    sizes = [core.parts[0].neurons for core in placement.cores]
    assert sizes[0] > 3 * sizes[-1]  # even neurons would be 1.9 times the mean at the end
    assert placement.synops == mask.sum()


def test_measured_rates_give_synaptic_operations_and_traffic():
    rate = tuple(i / 100 for i in range(100))
    demands = [
        LayerDemand("in", 100, on_chip=False, rate=rate, measured=True),
        LayerDemand("a", 50, (Connection("in", 100),), rate=0.2, measured=True),
        LayerDemand("b", 10, (Connection("a", 50),), rate=0.5, measured=True),
    ]
    placement = place(demands, "loihi2")
    assert [layer.synops for layer in placement.layers] == pytest.approx([50 * sum(rate), 10 * 50 * 0.2])
    assert placement.messages_from_host == pytest.approx(sum(rate))
    assert placement.messages_between_cores == pytest.approx(50 * 0.2)
    assert placement.measured
    assert not any("not measured" in note for note in placement.notes)


def test_too_many_inputs_are_split_and_summed():
    demands = chain(40_000, 30)
    placement = place(demands, "loihi2")
    check(placement, demands)
    roles = Counter(part.role for core in placement.cores for part in core.parts)
    assert roles["partial"] >= 3 * roles["sum"] > 0
    assert placement.layers[0].partial_sums
    assert any("one step later" in note for note in placement.notes)
    sums = [core for core in placement.cores if core.parts[0].role == "sum"]
    assert {placement.core_of("l0")[n] for n in range(30)} == {core.number for core in sums}
    assert sum(core.synops for core in placement.cores if core.parts[0].role == "partial") == 40_000 * 30


def test_partial_sums_need_graded_messages():
    with pytest.raises(DoesNotFit, match=r"axon_in 5,000 of 4,096.*partial sums need graded messages"):
        place(chain(5000, 4), "loihi1")


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (LayerDemand("c", 16 * 512, (Convolution("in", (4, 4, 512), 512, (3, 3), padding=(1, 1)),)), 3 * 3 * 512),
        (LayerDemand("c", 16, (Connection("in", 8192, mask=np.arange(8192) < 300 * np.arange(16)[:, None]),)), 300 * 15),
    ],
)
def test_a_neuron_with_too_many_inputs_is_the_one_that_is_named(layer, inputs):
    with pytest.raises(DoesNotFit, match=f"even one neuron of it does not fit: axon_in {inputs:,} of 4,096") as caught:
        place([LayerDemand("in", 8192), layer], "loihi1")
    assert caught.value.binding.used == inputs


def test_a_wide_convolution_is_split_by_input_channels():
    conv = Convolution("in", (3, 3, 3000), 4, (3, 3))
    demands = [LayerDemand("in", 27_000, on_chip=False, shape=(3, 3, 3000)), LayerDemand("c", 4, (conv,))]
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert placement.layers[0].partial_sums
    assert sum(core.synops for core in placement.cores if core.parts[0].role == "partial") == 27_000 * 4


def test_a_tall_convolution_is_cut_along_height_and_channels_too():
    conv = Convolution("in", (2, 80, 1), 9000, (1, 1), weight_bits=1)
    demands = [LayerDemand("in", 160, on_chip=False), LayerDemand("c", 2 * 80 * 9000, (conv,))]
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert all(part.box[1][1] - part.box[1][0] == 1 and part.neurons <= 4095 for c in placement.cores for part in c.parts)


def test_recurrence_counts_its_own_axons():
    demands = [LayerDemand("in", 10, on_chip=False), LayerDemand("r", 300, (Connection("in", 10), Connection("r", 300)))]
    (core,) = place(demands, "loihi1").cores
    assert core.used["axon_in"].used == 310
    assert core.used["axon_out"].used == 300


def test_output_axons_split_the_sender():
    """1,000 neurons that 20 cores listen to need 20,000 entries: at most 204 of them on a core with 4,096."""
    demands = chain(16, 768, 3072)
    placement = place(demands, "loihi1", budget="nengo")
    check(placement, demands)
    receivers = len(placement.layers[1].cores)
    senders = placement.layers[0].cores
    assert receivers == 21
    assert all(placement.cores[n].used["axon_out"].used == placement.cores[n].parts[0].neurons * receivers for n in senders)
    assert len(senders) == math.ceil(768 / (4096 // receivers))


def test_convolution_on_loihi_1_shares_synapses():
    conv = Convolution("in", (20, 20, 2), 2, (3, 3))
    demands = [LayerDemand("in", 800, on_chip=False), LayerDemand("c", 648, (conv,))]
    (core,) = place(demands, "loihi1", budget="nengo").cores
    budget = load_chip("loihi1").budgets["nengo"]
    # Per input channel: 1 to 3 kernel positions along each axis, in 5 patterns (0; 0 1; 0 1 2; 1 2; 2).
    lengths = [1, 2, 3, 2, 1]
    expected = 2 * sum(axon_words(budget, x * y * 2, 8, "sparse", 648) for x in lengths for y in lengths)
    assert core.used["synapse_words"].used == expected
    assert core.used["axon_in"].used == 800
    assert core.synops == 18 * 18 * 9 * 2 * 2


# --- chips -----------------------------------------------------------------------------------------------------------


def test_chips_keep_talking_cores_together():
    """Two groups of three cores, interleaved: filled in order 5 of 6 links would cross; apart, none does."""
    links = [(a, b) for group in ((0, 2, 4), (1, 3, 5)) for a in group for b in group if a < b]
    between = Edges(
        np.array([a for a, _ in links]),
        np.array([b for _, b in links]),
        np.ones(6, dtype=np.int64),
        np.ones(6),
        0.0,
    )
    core_of = np.arange(6)
    assert crossing(np.arange(6) // 3, between, core_of) == 4
    chip_of = assign(6, 3, between, core_of)
    assert crossing(chip_of, between, core_of) == 0
    assert Counter(chip_of.tolist()) == {0: 3, 1: 3}


@pytest.mark.parametrize("seed", range(5))
def test_chips_against_the_best_of_all_assignments(seed):
    import itertools

    rng = np.random.default_rng(seed)
    pairs = list(itertools.combinations(range(8), 2))
    between = Edges(
        np.array([a for a, _ in pairs]),
        np.array([b for _, b in pairs]),
        np.ones(len(pairs), dtype=np.int64),
        rng.random(len(pairs)) ** 4,
        0.0,
    )
    core_of = np.arange(8)
    best = min(
        crossing(np.isin(core_of, chosen).astype(int), between, core_of) for chosen in itertools.combinations(range(8), 4)
    )
    found = crossing(assign(8, 4, between, core_of), between, core_of)
    start = crossing(core_of // 4, between, core_of)
    assert best <= found <= min(start, 1.15 * best)


def test_two_networks_on_two_chips_do_not_talk():
    demands = []
    for name in ("a", "b"):
        demands += [
            LayerDemand(f"{name}0", 1024, on_chip=False),
            LayerDemand(f"{name}1", 4096, (Connection(f"{name}0", 1024),)),
            LayerDemand(f"{name}2", 256, (Connection(f"{name}1", 4096),)),
        ]
    placement = place([demands[i] for i in (0, 3, 1, 4, 2, 5)], "loihi2")
    check(placement, demands)
    assert placement.chips == 2
    # 95 cores each: the second network cannot stay whole, the first can.
    assert placement.messages_between_chips < 0.2 * placement.messages_between_cores


# --- what does not fit ----------------------------------------------------------------------------------------------


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
