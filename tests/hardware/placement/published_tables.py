"""Tables that Intel's compiler printed into public notebooks, and networks that give them. Sources: lava-dl d825ac5,
tutorials/lava/lib/dl/netx/{mnist/run,pilotnet_snn/benchmark,pilotnet_sdnn/benchmark}.ipynb; the detector: yolo_kp/run.ipynb
of the same folder at 21ba888."""

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

# A detector of ten convolutions. (W = H of the layer, channels, kernel, stride, weight bits that the words imply),
# slice, (axon-in, neurons, synapses, axon-map, axon-mem, total) in percent, cores
DETECTOR = {
    "1": ((224, 16, 3, 2, 5), (8, 28, 16), (0.01, 87.52, 0.34, 1.40, 0.70, 19.88), 224),
    "2": ((112, 32, 3, 2, 6), (8, 14, 32), (0.01, 87.52, 3.60, 0.70, 0.35, 21.65), 112),
    "3": ((56, 64, 3, 2, 5), (4, 14, 64), (0.01, 87.52, 10.80, 0.35, 0.17, 26.99), 56),
    "4": ((28, 128, 3, 2, 5), (4, 7, 128), (0.01, 87.52, 39.60, 0.17, 0.35, 50.03), 28),
    "5": ((28, 256, 3, 1, 5), (4, 7, 128), (0.01, 87.52, 79.20, 0.17, 0.17, 81.57), 56),
    "6": ((14, 256, 3, 2, 4), (8, 7, 64), (0.01, 87.52, 72.00, 0.35, 2.80, 78.05), 16),
    "7": ((14, 512, 3, 1, 5), (8, 7, 64), (0.01, 87.52, 86.40, 0.35, 0.35, 87.61), 32),
    "8": ((14, 256, 1, 1, 5), (2, 7, 256), (0.01, 87.52, 67.20, 0.09, 0.35, 72.04), 14),
    "9": ((14, 512, 3, 1, 5), (8, 7, 64), (0.01, 87.52, 86.40, 0.35, 0.17, 87.47), 32),
    "10": ((14, 48, 1, 1, 7), (4, 14, 48), (0.01, 65.64, 19.20, 16.80, 0.00, 42.26), 4),
}

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


def convolved(
    name: str, source: LayerDemand, channels: int, kernel: int, stride: int = 1, bits: int = 8, groups: int = 1
) -> LayerDemand:
    """A square convolution with the padding that keeps the size at stride 1."""
    conv = Convolution(
        source.name,
        source.box,
        channels,
        (kernel, kernel),
        (stride, stride),
        (kernel // 2, kernel // 2),
        groups=groups,
        weight_bits=bits,
    )
    width, height, depth = conv.output_shape
    return LayerDemand(name, width * height * depth, (conv,))


def detector() -> list[LayerDemand]:
    """The detector, its frames of 448 x 448 x 3 injected by the host."""
    found = [LayerDemand("in", 448 * 448 * 3, shape=(448, 448, 3), on_chip=False)]
    for name, ((_, channels, kernel, stride, bits), *_) in DETECTOR.items():
        found.append(convolved(name, found[-1], channels, kernel, stride, bits))
    return found


def resnet18() -> list[LayerDemand]:
    """ResNet-18 with 8-bit weights on frames of 224 x 224 x 3; pooling as an average, skips as synapses of their own."""
    found = [LayerDemand("in", 224 * 224 * 3, shape=(224, 224, 3), on_chip=False)]
    found.append(convolved("conv1", found[-1], 64, 7, 2))
    found.append(convolved("pool", found[-1], 64, 3, 2, groups=64))
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            source, stride = found[-1], 2 if stage > 1 and block == 0 else 1
            found.append(convolved(f"{stage}.{block}.a", source, channels, 3, stride))
            name = f"{stage}.{block}.b"
            skip = convolved(name, source, channels, 1, stride, groups=1 if stride == 2 else channels)
            after = convolved(name, found[-1], channels, 3)
            found.append(LayerDemand(name, after.neurons, after.connections + skip.connections))
    last = found[-1]
    average = Convolution(last.name, last.box, 512, (7, 7), groups=512)
    found.append(LayerDemand("average", 512, (average,)))
    found.append(LayerDemand("fc", 1000, (Connection("average", 512),)))
    return found
