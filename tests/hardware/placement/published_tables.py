"""Tables that Intel's compiler printed into public notebooks, and networks that give them. Sources: lava-dl d825ac5,
tutorials/lava/lib/dl/netx/{mnist/run,pilotnet_snn/benchmark,pilotnet_sdnn/benchmark}.ipynb."""

from __future__ import annotations

from hardware.placement import Connection, Convolution, LayerDemand

# layer -> (axon-in, groups, neurons, synapses, axon-map, total) in percent, and cores
MNIST = {
    "128->64": ((0.80, 12.50, 1.56, 16.80, 0.40, 14.72), 1),
    "64->10": ((0.40, 12.50, 0.24, 1.60, 0.06, 1.71), 1),
    "784->128": ((4.90, 12.50, 1.22, 78.40, 0.31, 67.14), 3),
}

# layer -> (slice, axon-in, neurons, words SNN, words SDNN, axon-map, cores); means where the published row is a mean
PILOTNET = {
    "10->1": (None, 10, 1, 10, 10, 1, 1),
    "50->10": (None, 50, 10, 150, 150, 10, 1),
    "100->50": (None, 100, 50, 1300, 1500, 50, 1),
    "2560->100": (None, 2560, 8, 7253, 7253, 8, 12),
    "64->64": ((16, 2, 64), 1, 2048, 2880, 2880, 1280, 2),
    "48->64": ((8, 4, 64), 1, 2048, 2160, 2592, 29, 3),
    "36->48": ((8, 7, 48), 2, 2688, 1620, 1620, 112, 3),
    "24->36": ((4, 15, 36), 2, 2160, 864, 864, 113, 13),
    "3->24": ((4, 32, 24), 2, 3072, 81, 81, 253, 25),
}
PILOTNET_INPUT = ((16, 66, 3), 1, 3168, 0, 13)

# Weight bits that the word counts imply; for two convolutions the weights may need 5 and the row fits 6.
BITS = {
    "snn": {"3->24": 6, "24->36": 6, "36->48": 6, "48->64": 4, "64->64": 4, "2560->100": 3, "100->50": 4, "50->10": 6},
    "sdnn": {"3->24": 6, "24->36": 6, "36->48": 6, "48->64": 5, "64->64": 4, "2560->100": 4, "100->50": 6, "50->10": 6},
}

# in, out -> Loihi 1 dense (nengo rule), Loihi 2 sparse-encoded, Loihi 2 dense, all 8 bits; Loihi 2 sparse ternary
LINEAR = {
    (128, 128): (1, 1, 1, 1),
    (128, 512): (1, 2, 1, 1),
    (512, 128): (1, 2, 1, 1),
    (256, 1024): (3, 6, 3, 4),
    (512, 512): (3, 6, 3, 4),
    (512, 2048): (9, 21, 9, 15),
    (2048, 512): (9, 25, 10, 17),
    (768, 3072): (20, 49, 20, 35),
    (3072, 768): (21, 52, 21, 35),
    (1024, 4096): (35, 88, 35, 62),
    (4096, 1024): (35, 114, 47, 79),
    (4096, 4096): (137, 456, 187, 316),
}


def linear(inputs: int, outputs: int, bits: int = 8) -> list[LayerDemand]:
    """One layer fed by the host."""
    return [
        LayerDemand("in", inputs, on_chip=False),
        LayerDemand("fc", outputs, (Connection("in", inputs, bits),)),
    ]


def mnist() -> list[LayerDemand]:
    found = [LayerDemand("in", 784, on_chip=False)]
    source = found[0]
    for inputs, outputs in ((784, 128), (128, 64), (64, 10)):
        found.append(LayerDemand(f"{inputs}->{outputs}", outputs, (Connection(source.name, inputs),)))
        source = found[-1]
    return found


def pilotnet(kind: str, bits: dict[str, int] | None = None) -> list[LayerDemand]:
    """PilotNet; the SNN holds its input on the chip."""
    bits = BITS[kind] if bits is None else bits
    found = [LayerDemand("input", 200 * 66 * 3, shape=(200, 66, 3), on_chip=kind == "snn")]
    geometry = {
        "3->24": ((2, 2), (0, 0)),
        "24->36": ((2, 2), (0, 0)),
        "36->48": ((2, 2), (0, 0)),
        "48->64": ((1, 2), (0, 1)),
        "64->64": ((1, 1), (0, 0)),
    }
    for name, (stride, padding) in geometry.items():
        source = found[-1]
        conv = Convolution(
            source.name, source.box, int(name.split(">")[1]), (3, 3), stride, padding, weight_bits=bits[name]
        )
        width, height, channels = conv.output_shape
        found.append(LayerDemand(name, width * height * channels, (conv,)))
    for name in ("2560->100", "100->50", "50->10", "10->1"):
        inputs, outputs = (int(n) for n in name.split("->"))
        found.append(LayerDemand(name, outputs, (Connection(found[-1].name, inputs, bits.get(name, 8)),)))
    return found
