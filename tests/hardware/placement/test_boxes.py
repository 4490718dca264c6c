"""Convolutions are cut into the fewest equal boxes: against a search of every cut, a published detector and ResNet-18."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hardware import load_chip
from hardware.placement import Convolution, DoesNotFit, LayerDemand, place
from hardware.placement.cost import Part, mapped_by_position, over, resources
from hardware.placement.split import split_layer
from tests.hardware.placement import published_tables as tables
from tests.hardware.placement.chains import check

INFERRED = load_chip("loihi2").budgets["inferred"]


def alone(shape: tuple[int, int, int], channels: int, cores: int | None = None) -> list[LayerDemand]:
    """One 3 x 3 convolution, fed and read by the host."""
    source = LayerDemand("in", math.prod(shape), shape=shape, on_chip=False)
    layer = tables.convolved("c", source, channels, 3)
    return [source, LayerDemand("c", layer.neurons, layer.connections, cores=cores)]


def parts_of(demands: list[LayerDemand]) -> dict[str, tuple[Part, ...]]:
    layers = {demand.name: demand for demand in demands}
    positions = mapped_by_position(layers)
    return {
        name: split_layer(layer, INFERRED, layers, graded=True, by_position=name in positions)
        for name, layer in layers.items()
        if layer.on_chip
    }


# --- ResNet-18 -------------------------------------------------------------------------------------------------------


def best_equal_boxes(layer: LayerDemand, by_position: bool) -> int:
    """Every cut of the three axes, held against the four limits that a Loihi 2 core has, written out by hand."""
    width, height, depth = layer.box

    def words(c: int) -> int:
        total = 0
        for conv in layer.connections:
            per_group = conv.channels // conv.groups
            inputs = conv.input_shape[2] * (1 if conv.groups == 1 else c / conv.channels)
            total += math.ceil(inputs) * math.prod(conv.kernel) * math.ceil((min(c, per_group) * 8 + 10) / 64)
        return total

    def fits(w: int, h: int, c: int) -> bool:
        neurons, axons = w * h * c, len(layer.connections) * math.ceil(w * h * c / 2048)
        held = neurons + axons + 1 + words(c) + (w * h if by_position else neurons)
        return neurons <= 4095 and words(c) <= 16_000 and held <= 20_000

    deepest = {math.ceil(depth / n): n for n in range(depth, 0, -1)}
    best = depth * width * height
    for w, h in itertools.product(range(1, width + 1), range(1, height + 1)):
        for size, n in deepest.items():
            if w * h * n < best and fits(math.ceil(width / w), math.ceil(height / h), size):
                best = w * h * n
    return best


def test_resnet_18_takes_the_best_equal_boxes_of_every_convolution():
    demands = tables.resnet18()
    found = parts_of(demands)
    before_the_dense_layer = mapped_by_position({demand.name: demand for demand in demands})
    assert before_the_dense_layer == {demand.name for demand in demands} - {"average", "fc"}
    for layer in demands[1:-1]:
        best = best_equal_boxes(layer, layer.name != "average")
        assert best <= len(found[layer.name]) <= 1.1 * best, (layer.name, len(found[layer.name]), best)
        for axis in range(3):
            sizes = {part.box[axis][1] - part.box[axis][0] for part in found[layer.name]}
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("shape", "before", "cores"), [((28, 28, 128), 1568, 26), ((14, 14, 256), 1176, 13)])
def test_boxes_where_slices_along_width_and_height_took_a_core_for_every_position(shape, before, cores):
    demands = alone(shape, shape[2])
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert len(placement.cores) == cores < before / 50
    assert placement.layers[0].imbalance < 1.1


def test_cuts_along_channels_where_the_words_of_the_weights_bind():
    """49 positions would fit 7 cores by their neurons; 4,608 entries of more than 3 words do not fit one."""
    parts = parts_of(alone((7, 7, 512), 512))["c"]
    assert len(parts) == 24
    assert {part.box[:2] for part in parts} == {((0, 7), (0, 7))}
    used = resources(alone((7, 7, 512), 512)[1], parts[0], INFERRED)
    assert used["synapse_words"] == 4608 * 3
    assert INFERRED.limits["synapse_words"] < 4608 * 4


# --- a published detector --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.DETECTOR)
def test_the_compilers_own_boxes_fit_and_take_what_its_table_says(name):
    layers = {demand.name: demand for demand in tables.detector()}
    (size, channels, *_), box, (axon_in, neurons, words, axon_map, axon_mem, total), cores = tables.DETECTOR[name]
    layer = layers[name]
    assert math.prod(math.ceil(n / m) for n, m in zip((size, size, channels), box, strict=True)) == cores
    part = Part(name, tuple((0, n) for n in box))
    used = resources(layer, part, INFERRED, by_position=name in mapped_by_position(layers))
    assert over(used, INFERRED) is None
    percent = {key: round(100 * used[key] / INFERRED.limits[key] + 1e-9, 2) for key in used}
    assert percent["neurons"] == neurons
    assert percent["synapse_words"] == words
    assert percent["axon_map"] == pytest.approx(axon_map, abs=0.011)  # the table cuts some digits off
    assert percent["axon_in"] == pytest.approx(axon_in, abs=0.0051)
    # Axon-mem is a share of 16,000 too; one word more or less of the pool is the second neuron group of the last layer.
    assert (used["pool"] + 160 * axon_mem) / 200 == pytest.approx(total, abs=0.015)


def test_the_detector_takes_no_more_cores_than_the_compiler_gave_it():
    found = parts_of(tables.detector())
    published = {name: row[3] for name, row in tables.DETECTOR.items()}
    assert sum(published.values()) == 574
    assert all(len(found[name]) <= published[name] for name in published)
    assert sum(map(len, found.values())) == 515  # 5,337 by slices along width, then height


@pytest.mark.parametrize("budget", ["inferred", "inferred-2023"])
@pytest.mark.parametrize("kind", ["snn", "sdnn"])
def test_no_row_of_pilotnet_takes_more_cores_than_the_compiler_gave_it(kind, budget):
    placement = place(tables.pilotnet(kind), "loihi2", budget=budget)
    published = {name: row[-1] for name, row in tables.PILOTNET.items()} | {"input": tables.PILOTNET_INPUT[-1]}
    assert all(len(layer.cores) <= published[layer.name] for layer in placement.layers)
    # What slices along width gave before there were boxes.
    before = {"snn": {"inferred": 50, "inferred-2023": 52}, "sdnn": {"inferred": 40, "inferred-2023": 42}}[kind][budget]
    assert len(placement.cores) <= before


# --- the search ------------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> list[LayerDemand]:
    channels, groups = draw(st.sampled_from([(16, 1), (64, 1), (128, 1), (128, 2), (64, 64)]))
    shape = (draw(st.integers(3, 14)), draw(st.integers(3, 14)), channels)
    out = channels if groups == 64 else draw(st.sampled_from([8, 24, 64, 128]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, padding = draw(st.tuples(st.integers(1, 2), st.integers(1, 2))), draw(st.tuples(*[st.integers(0, 2)] * 2))
    conv = Convolution("in", shape, out, draw(pair), stride, padding, groups=groups)
    source = LayerDemand("in", math.prod(shape), shape=shape, on_chip=False)
    return [source, LayerDemand("c", math.prod(conv.output_shape), (conv,))]


@pytest.mark.parametrize(("chip", "budget"), [("loihi2", "inferred"), ("loihi1", "nengo")])
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(demands=convolutions())
def test_no_cut_into_equal_boxes_has_fewer(chip, budget, demands):
    layer, held = demands[1], load_chip(chip).budgets[budget]
    found = split_layer(layer, held, {demand.name: demand for demand in demands}, graded=chip == "loihi2")
    assert not any(part.role == "sum" for part in found)
    known: dict[tuple, bool] = {}

    def spans(length: int, parts: int) -> list[tuple[int, int]]:
        long = length % parts
        ends = [n * (length // parts) + min(n, long) for n in range(parts + 1)]
        return list(itertools.pairwise(ends))

    def fits(box: tuple) -> bool:
        if box not in known:
            known[box] = over(resources(layer, Part("c", box), held), held) is None
        return known[box]

    for cut in itertools.product(*(range(1, size + 1) for size in layer.box)):
        if math.prod(cut) < len(found):
            assert not all(map(fits, itertools.product(*map(spans, layer.box, cut)))), cut


def test_of_cuts_into_as_many_boxes_the_one_with_the_fewest_messages_is_taken():
    """30 x 30 positions of 32 channels take 8 boxes: 4 x 2 of 8 x 15 positions need fewer neighbours than 8 strips."""
    demands = alone((30, 30, 32), 32)
    placement = place(demands, "loihi2")
    assert len(placement.cores) == 8
    (conv,) = demands[1].connections

    def messages(w: int, h: int, c: int) -> int:
        wide, high = (sum(min(30, (i + 1) * 30 // n + 1) - max(0, i * 30 // n - 1) for i in range(n)) for n in (w, h))
        return wide * high * c * 32

    least = min(messages(w, h, c) for w, h, c in itertools.product(range(1, 9), repeat=3) if w * h * c == 8)
    assert placement.messages_from_host == least == messages(4, 2, 1) < messages(8, 1, 1)
    assert conv.kernel == (3, 3)


def test_a_number_of_cores_that_is_asked_for_is_a_product_of_cuts():
    demands = alone((28, 28, 128), 128, cores=32)
    placement = place(demands, "loihi2")
    check(placement, demands)
    assert Counter(part.neurons for core in placement.cores for part in core.parts) == {7 * 7 * 64: 32}
    with pytest.raises(DoesNotFit, match=r"c, asked for on 25 cores does not fit: neurons .* of 4,095.*over 26 cores"):
        place(alone((28, 28, 128), 128, cores=25), "loihi2")


def test_a_layer_that_a_dense_layer_or_the_host_reads_is_mapped_by_neuron():
    demands = tables.pilotnet("sdnn")
    assert mapped_by_position({demand.name: demand for demand in demands}) == {
        "input",
        "3->24",
        "24->36",
        "36->48",
        "48->64",
    }
    (core,) = place(alone((8, 8, 4), 4), "loihi2").cores
    assert core.used["axon_map"].used == 8 * 8 * 4
