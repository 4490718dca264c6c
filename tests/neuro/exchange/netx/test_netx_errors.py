"""`.net` files that are damaged, contradict themselves, or hold what a graph has not: a typed error with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from neuro.exchange.netx import NetxFileError, NotInNetx, encode_input, from_frames, load_netx, to_frames
from neuro.graph import Population, SpikingGraph
from tests.neuro.exchange.netx.netx_files import CUBA, LOIHI, RF, SDNN, write

INPUT = {"type": "input", "shape": [6]}
PICTURE = {"type": "input", "shape": [2, 4, 5]}
DENSE = {"type": "dense", "shape": [5], "weight": np.full((5, 6), 2.0), "neuron": LOIHI}
CONV = {"type": "conv", "shape": [3, 3, 4], "weight": np.full((3, 2, 2, 2), 2.0), "neuron": LOIHI, "groups": 1}


def without(layer: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in layer.items() if key not in keys}


def neuron(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in base.items() if key not in changes or changes[key] is not None}
    return {**kept, **{key: value for key, value in changes.items() if value is not None}}


FRACTION = np.full((5, 6), 2.0)
FRACTION[1, 4] = 0.5
WRONG: dict[str, tuple[list[dict[str, Any]], type[Exception], str]] = {
    "fractions": (
        [INPUT, {**DENSE, "weight": FRACTION}],
        NetxFileError,
        r"layer 1 \(dense\): weight\[1, 4\] is 0\.5, and 1 of 30 values are no whole numbers.*quantisation on",
    ),
    "not a number": (
        [INPUT, {**DENSE, "bias": [np.nan]}],
        NetxFileError,
        r"layer 1 \(dense\): bias\[0\] is nan",
    ),
    "no weight": ([INPUT, without(DENSE, "weight")], NetxFileError, r"layer 1 \(dense\): 'weight' is missing; there is: "),
    "text": (
        [INPUT, {**DENSE, "weight": "heavy"}],
        NetxFileError,
        r"layer 1 \(dense\): weight is the text 'heavy', and numbers are needed",
    ),
    "columns": (
        [INPUT, {**DENSE, "weight": np.full((5, 7), 2.0)}],
        NetxFileError,
        r"weight has shape \(5, 7\); 5 neurons and 6 sources need \(5, 6\)",
    ),
    "type": (
        [INPUT, {**DENSE, "type": "densest"}],
        NotInNetx,
        r"layer 1 has type 'densest', which is unknown; known: input",
    ),
    "transposed": ([INPUT, {**DENSE, "type": "convT"}], NotInNetx, r"layer 1 is a transposed convolution.*Train with conv"),
    "unpool": ([INPUT, {**DENSE, "type": "unpool"}], NotInNetx, r"layer 1 is an unpooling.*Train without it"),
    "kernel": (
        [PICTURE, {**CONV, "weight": np.full((3, 2, 5, 2), 2.0)}],
        NotInNetx,
        r"layer 1 \(conv\): .*kernel reaches over 5 positions of axis 1, and the padded input has 4",
    ),
    "kernel of a pool": (
        [PICTURE, {"type": "pool", "weight": np.full((1, 1, 2, 6), 2.0), "neuron": LOIHI}],
        NotInNetx,
        r"layer 1 \(pool\): .*kernel reaches over 6 positions of axis 0, and the padded input has 5",
    ),
    "odd pool": (
        [PICTURE, {"type": "pool", "shape": [2, 2, 3], "weight": np.full((1, 1, 2, 2), 2.0), "neuron": LOIHI}],
        NotInNetx,
        r"layer 1 \(pool\): shape is \(2, 2, 3\), .*make y and x multiples of the kernel",
    ),
    "shape of a conv": (
        [PICTURE, {**CONV, "shape": [3, 3, 3]}],
        NetxFileError,
        r"layer 1 \(conv\): shape is \(3, 3, 3\), and its kernel over \(2, 4, 5\) gives \(3, 3, 4\)",
    ),
    "groups": ([PICTURE, {**CONV, "groups": 2}], NotInNetx, r"layer 1 \(conv\): .*2 groups"),
    "wide kernel": (
        [PICTURE, {**CONV, "weight": np.full((3, 2, 2, 2), 200.0), "neuron": neuron(LOIHI, wgtExp=1)}],
        NotInNetx,
        r"weight reaches from 200 to 200 with wgtExp 1; a kernel holds -256\.\.255",
    ),
    "wide odd weights": (
        [INPUT, {**DENSE, "weight": np.resize([129.0, -2.0], (5, 6))}],
        NotInNetx,
        r"weight reaches from -2 to 129, odd ones among them; a synapse holds 8 bits",
    ),
    "loop without neurons": (
        [INPUT, DENSE, {"type": "concat", "layers": [3]}, {"type": "flatten"}, {**DENSE, "weight": np.full((5, 10), 2.0)}],
        NotInNetx,
        r"layer 2 \(concat\): it joins layer 2 \(concat\), a loop that no neurons delay; join a layer of neurons",
    ),
    "joins itself": (
        [INPUT, DENSE, {"type": "concat", "layers": [2]}, {**DENSE, "weight": np.full((5, 10), 2.0)}],
        NotInNetx,
        r"it joins layer 2 \(concat\), a loop that no neurons delay",
    ),
    "joins what is not there": (
        [INPUT, DENSE, {"type": "concat", "layers": [9]}, {**DENSE, "weight": np.full((5, 10), 2.0)}],
        NetxFileError,
        r"layer 2 \(concat\): it joins layer 9; there are 0\.\.3",
    ),
    "joins for a convolution": (
        [PICTURE, CONV, {"type": "concat", "layers": [0]}, CONV],
        NotInNetx,
        r"layer 2 \(concat\) joins layers for layer 3 \(conv\); only a dense layer reads several",
    ),
    "iDecay": (
        [INPUT, {**DENSE, "neuron": neuron(LOIHI, iDecay=0)}],
        NotInNetx,
        r"iDecay reaches from 0 to 0; .*1\.\.4096",
    ),
    "vDecay": ([INPUT, {**DENSE, "neuron": neuron(LOIHI, vDecay=4096)}], NotInNetx, r"vDecay reaches from 4096 to 4096"),
    "threshold": (
        [INPUT, {**DENSE, "neuron": neuron(LOIHI, vThMant=2**17)}],
        NotInNetx,
        r"layer 1 \(dense\): population 'layer1': vth is 131072; its register holds 0\.\.131071",
    ),
    "no vDecay": ([INPUT, {**DENSE, "neuron": neuron(LOIHI, vDecay=None)}], NetxFileError, r"'neuron/vDecay' is missing"),
    "graded": ([INPUT, {**DENSE, "neuron": neuron(CUBA, gradedSpike=True)}], NotInNetx, r"gradedSpike is on"),
    "adaptive": ([INPUT, {**DENSE, "neuron": neuron(LOIHI, type="ALIF")}], NotInNetx, r"'ALIF': its threshold adapts"),
    "neurons": ([INPUT, {**DENSE, "neuron": neuron(LOIHI, type="HH")}], NotInNetx, r"neurons of type 'HH' are unknown"),
    "norm": ([INPUT, {**DENSE, "neuron": neuron(LOIHI, weight_exp=2.0)}], NotInNetx, r"division of a WgtScaleBatchNorm"),
    "activation": (
        [INPUT, {**DENSE, "neuron": neuron(SDNN, activation="gelu")}],
        NotInNetx,
        r"activation 'gelu'; lava-dl's own reader takes every activation for relu",
    ),
    "bias without neurons": (
        [INPUT, {**without(DENSE, "neuron"), "bias": [1.0]}],
        NotInNetx,
        r"layer 1 \(dense\) has a bias and no neurons",
    ),
    "bias of another size": (
        [INPUT, {**DENSE, "bias": np.ones(4)}],
        NetxFileError,
        r"bias has 4 values; 1, 5 \(channels\)",
    ),
    "late": ([INPUT, {**DENSE, "delay": np.full(5, 63.0)}], NotInNetx, r"delay reaches from 63 to 63; .*0\.\.62 steps"),
    "early": ([INPUT, {**DENSE, "delay": np.full(5, -1.0)}], NotInNetx, r"delay reaches from -1 to -1"),
    "delays of another size": ([INPUT, {**DENSE, "delay": np.ones(4)}], NetxFileError, r"delay has shape \(4,\)"),
    "delay before a convolution": (
        [
            PICTURE,
            {**CONV, "delay": np.array([0, 1, 2])},
            {**CONV, "shape": [3, 2, 3], "weight": np.full((3, 3, 2, 2), 2.0)},
        ],
        NotInNetx,
        r"layer 2 \(conv\) reads layer1, which delays what it sends, and a convolution has no delays",
    ),
    "delay that nothing reads": (
        [INPUT, {**DENSE, "type": "dense_rec", "weight_rec": np.full((5, 5), 2.0), "delay": np.arange(5)}],
        NotInNetx,
        r"layer1 delays what it sends, and nothing in the graph reads it",
    ),
    "neurons at the input": ([{**INPUT, "neuron": RF}, DENSE], NotInNetx, r"layer 0 \(input\): neurons of type 'RF_PHASE'"),
    "no neurons at all": ([INPUT, {"type": "flatten", "shape": [6]}], NetxFileError, r"no layer of neurons"),
    "no shape": (
        [INPUT, without({**DENSE, "weight": np.full(30, 2.0)}, "shape")],
        NetxFileError,
        r"'shape' is missing, and its",
    ),
    "two inputs": ([INPUT, INPUT, DENSE], NetxFileError, r"layer 1 \(input\): an input stands first only"),
    "average": ([INPUT, DENSE, {"type": "average", "shape": [2]}], NetxFileError, r"a number of outputs that divides them"),
    "size": ([{"type": "input", "shape": [2**13, 2**13]}, DENSE], NetxFileError, r"67,108,864 neurons; 16,777,216 are the"),
    "shape of nothing": (
        [{"type": "input", "shape": [0]}, DENSE],
        NetxFileError,
        r"shape is \[0\]; one to three sizes from 1",
    ),
    "no input": ([CONV], NotInNetx, r"nothing says the shape of its input; give input_shape=\(c, y, x\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    layers, error, text = WRONG[name]
    path = write(tmp_path / "a.net", layers)
    with pytest.raises(error, match=text) as caught:
        load_netx(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("base", "given"), [(SDNN, "SDNN"), ({**RF, "type": "RF_IZHIKEVICH"}, "RF_IZHIKEVICH")], ids=["sdnn", "rf"]
)
def test_neurons_without_a_reset_are_refused_where_one_is_asked_for(
    base: dict[str, Any], given: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.net", [INPUT, {**DENSE, "neuron": base}])
    with pytest.raises(NotInNetx, match=f"neurons of type '{given}' have no reset; leave reset_interval out"):
        load_netx(path, reset_interval=4)
    with pytest.raises(NotInNetx, match="reset_interval is 0"):
        load_netx(path, reset_interval=0)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.net", [INPUT, DENSE, {**DENSE, "weight": np.full((5, 5), 2.0)}]).read_bytes()
    load_netx(tmp_path / "whole.net")
    path = tmp_path / "cut.net"
    for kept in [0, 1, 7, 8, 100, *range(400, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:kept])
        with pytest.raises(NetxFileError, match="may have been cut short, so copy or export it again"):
            load_netx(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.net"
    with pytest.raises(FileNotFoundError, match=r"a\.net: no such file"):
        load_netx(path)
    path.write_text("layer: []\n")
    with pytest.raises(NetxFileError, match="is no whole HDF5 file"):
        load_netx(path)
    with h5py.File(path, "w") as file:
        file["model"] = [1, 2]
    with pytest.raises(NetxFileError, match=r"no group 'layer', which a \.net file of lava-dl has; it holds: model"):
        load_netx(path)
    with h5py.File(path, "w") as file:
        file.create_group("layer")
    with pytest.raises(NetxFileError, match="its group 'layer' is empty"):
        load_netx(path)
    write(path, [INPUT, DENSE])
    with h5py.File(path, "a") as file:
        file.move("layer/1", "layer/2")
    with pytest.raises(NetxFileError, match="layer 1 of 2 is missing; there are: 0, 2"):
        load_netx(path)


def test_claims_beyond_the_file_and_links_out_of_it_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.net"
    write(path, [INPUT, DENSE])
    with h5py.File(path, "a") as file:
        file.create_dataset("layer/1/huge", (2**20, 2**12), "f4", chunks=(1024, 1024), compression="gzip")
    with pytest.raises(NetxFileError, match=r"its values take 17,179,869,.* are the limit for a file of"):
        load_netx(path)
    write(path, [INPUT, without(DENSE, "weight")])
    with h5py.File(path, "a") as file:
        file["layer/1/weight"] = h5py.ExternalLink("other.net", "weight")
    with pytest.raises(NetxFileError, match="points to another file"):
        load_netx(path)


def test_values_that_are_neither_numbers_nor_texts_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.net", [INPUT, DENSE])
    with h5py.File(path, "a") as file:
        ragged = file.create_dataset("layer/1/odd", (1,), h5py.vlen_dtype(np.int32))
        ragged[0] = np.array([1, 2], dtype=np.int32)
    with pytest.raises(NetxFileError, match="'layer/1/odd' holds neither numbers nor texts"):
        load_netx(path)


def test_a_file_that_the_look_at_its_texts_refuses_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.net", [INPUT, DENSE])
    data = path.read_bytes()
    at = data.index(b"GCOL")
    path.write_bytes(data[: at + 8] + (2**40).to_bytes(8, "little") + data[at + 16 :])
    with pytest.raises(NetxFileError, match="its heap of texts is damaged; copy or export it again"):
        load_netx(path)


def test_values_that_do_not_fit_the_input_are_refused(tmp_path: Path) -> None:
    first = {**PICTURE, "neuron": {**LOIHI}, "weight": 64.0}
    graph = load_netx(write(tmp_path / "a.net", [first, CONV]))
    for values, text in (
        (np.zeros((1, 3, 5, 4, 2)), r"shape \(1, 3, 5, 4, 2\); \(batch, steps, 2, 4, 5\), which is \(c, y, x\)"),
        (np.full((1, 1, 40), np.inf), "not finite"),
        (np.full((1, 1, 40), 1e6), "its messages hold -8388608..8388607; scale the values"),
        (np.array([["a"]]), "numbers"),
    ):
        with pytest.raises(NotInNetx, match=text):
            encode_input(graph, values)
    with pytest.raises(NotInNetx, match=r"values of 'layer1' have shape \(1, 36\)"):
        to_frames(graph, "layer1", np.zeros((1, 36)))
    bare = load_netx(write(tmp_path / "b.net", [PICTURE, CONV]))
    with pytest.raises(NotInNetx, match="input has fractions, and layer 0 has no neurons"):
        encode_input(bare, np.full((1, 1, 40), 0.5))
    other = SpikingGraph((Population("x", "lif", 1, {"du": 0, "dv": 0, "vth": 1}),), (), ("x",))
    with pytest.raises(NotInNetx, match=r"the graph did not come from a \.net file"):
        from_frames(other, "x", np.zeros((1, 1, 1)))
