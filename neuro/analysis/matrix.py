"""The matrix of neuro/README.md: each kind of operation on each shipped chip, as the rules themselves say it.

`python -m neuro.analysis.matrix` prints it; `--write` puts it between the `compat` marks of the README.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hardware.chips.chip import Chip, list_chips, load_chip
from neuro.analysis.fit import Fitter
from neuro.analysis.registry import registered
from neuro.analysis.rules import ROUTES, Rule, Where, rules_for
from neuro.analysis.tracing import TracedOp

README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = ("<!-- compat -->\n", "<!-- /compat -->")
CONV1D = "transformers.pytorch_utils.Conv1D"
THRESHOLD = "neuro.modules.thresholds.EventThreshold"


def _op(target: str, *shapes: tuple[int, ...], weights: tuple[str, ...] = (), scalars: tuple[Any, ...] = ()) -> TracedOp:
    shapes = shapes or ((1, 64),)
    return TracedOp(0, target, "", (), weights, shapes, shapes[0], scalars)


def _linear(width_in: int, width_out: int) -> TracedOp:
    return _op("linear", (1, width_in), (width_out, width_in), weights=("weight",))


PICTURE = (1, 16, 16, 16)


def _convolution(channels_in: int, channels_out: int) -> TracedOp:
    return _op("conv2d", (1, channels_in, *PICTURE[2:]), (channels_out, channels_in, 3, 3), weights=("weight",))


HEADS = ((1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
SAMPLES: tuple[tuple[str, TracedOp, Mapping[str, Any]], ...] = (
    ("linear layer, 256 to 1,024", _linear(256, 1024), {"mapped": True}),
    ("linear layer, 8,192 to 64", _linear(8192, 64), {"mapped": True}),
    ("ReLU of an MLP pair", _op("relu"), {"in_pair": "relu"}),
    ("square of an MLP pair", _op("square"), {"in_pair": "relu2"}),
    ("ReLU elsewhere", _op("relu"), {}),
    ("event threshold of an MLP pair", _op("EventThreshold"), {"layer": THRESHOLD, "in_pair": "relu"}),
    ("event threshold elsewhere", _op("EventThreshold"), {"layer": THRESHOLD}),
    ("Hugging Face's Conv1D", _op("Conv1D"), {"layer": CONV1D}),
    ("product with a bare parameter", _op("matmul", (1, 64), (64, 64), weights=("weight",)), {}),
    ("ReLU6, hardtanh, clamp", _op("hardtanh"), {}),
    ("GELU", _op("gelu"), {}),
    ("SiLU", _op("silu"), {}),
    ("tanh", _op("tanh"), {}),
    ("RMSNorm", _op("rms_norm"), {}),
    ("LayerNorm", _op("layer_norm"), {}),
    ("BatchNorm in evaluation", _op("batch_norm"), {}),
    ("attention scores, attention softmax, attention x value", _op("scaled_dot_product_attention", *HEADS), {}),
    ("matrix product of activations", _op("matmul", (2, 8, 16), (2, 16, 8)), {}),
    ("embedding look-up", _op("embedding"), {}),
    ("residual add", _op("add", (1, 64), (1, 64)), {}),
    ("product of activations", _op("mul", (1, 64), (1, 64)), {}),
    ("square elsewhere", _op("square"), {}),
    ("exp, log, powers", _op("exp"), {}),
    ("convolution of 3 x 3, 16 to 32 channels of 16 x 16", _convolution(16, 32), {"mapped": True}),
    ("BatchNorm behind a convolution", _op("batch_norm", PICTURE), {"in_chain": True}),
    ("ReLU between convolutions", _op("relu", PICTURE), {"in_chain": True}),
    ("average or sum pooling between convolutions", _op("avg_pool2d", PICTURE), {"in_chain": True}),
    ("residual add between convolutions", _op("add", PICTURE, PICTURE), {"in_chain": True}),
    ("max pooling", _op("max_pool2d", PICTURE), {}),
    ("transposed convolution", _op("conv_transpose2d", PICTURE, (16, 8, 3, 3), weights=("weight",)), {}),
    ("LSTM, GRU, RNN", _op("lstm", (1, 64), (256, 64), weights=("weight",)), {}),
    ("bilinear layer", _op("bilinear", (1, 64), (8, 64, 64), weights=("weight",)), {}),
    ("masks and positions", _op("arange"), {}),
    ("reshapes, splits, copies", _op("view"), {}),
    ("anything unknown", _op("my_operation"), {}),
)
"""Name in the matrix, an operation, and how `rules_for` is asked about it."""


def route_of(chip: Chip) -> str:
    """The default route on a chip."""
    return "graded" if chip.graded else "rate"


def cell(chip: Chip, op: TracedOp, settings: Mapping[str, Any]) -> str:
    """Verdict, place, and the error bound or limit of one operation on a chip's default route."""
    route = route_of(chip)
    asked = dict(settings)
    if "layer" in asked:
        asked["layer"] = registered()[asked["layer"]]
    if route == "rate" and (asked.get("in_pair") == "relu2" or asked.get("layer") is not None):
        asked.pop("in_pair", None)  # the rate route takes the two layers one by one
    if asked.get("mapped"):
        fitter, (given, weight) = Fitter(chip, graded=ROUTES[route]), op.in_shapes
        if op.target == "conv2d":
            layer = nn.Conv2d(weight[1], weight[0], weight[2], padding="same", device="meta")
            asked["fit"] = fitter.convolution(layer, given[1:])
        else:
            asked["fit"] = fitter.linear(given[-1], weight[0])
        asked["mapped"] = asked["fit"].fits
    rules = rules_for(op, Where(chip, route), **asked)
    texts = dict.fromkeys(_text(rule) for rule in rules)
    return " / ".join(texts)


def _text(rule: Rule) -> str:
    place = rule.verdict if rule.verdict == rule.runs_on else f"{rule.verdict}, on {rule.runs_on}"
    if rule.error_bound is not None:
        return f"{place}: {rule.error_bound:.2g} ({rule.bound_of})"
    if rule.limit:
        cores = f", {rule.cores} core{'s' * (rule.cores > 1)}" if rule.cores else ""
        return f"{place}: {rule.limit} {rule.need:,} of {rule.have:,}{cores}"
    return place


def compat_table() -> str:
    """Markdown: a row for each kind of operation, a column for each shipped chip by its default route."""
    chips = [load_chip(name) for name in list_chips()]
    lines = [
        "| operation | " + " | ".join(f"{chip.name}, {route_of(chip)} route" for chip in chips) + " |",
        "|---" * (len(chips) + 1) + "|",
    ]
    for label, op, settings in SAMPLES:
        lines.append(f"| {label} | " + " | ".join(cell(chip, op, settings) for chip in chips) + " |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A README's text with the matrix as it is now. Raises ValueError where the marks are missing."""
    before, found, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (found and end):
        raise ValueError(f"the marks {MARKS[0].strip()} and {MARKS[1]} are missing")
    return f"{before}{found}{compat_table()}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the matrix, or write it into the README."""
    parser = argparse.ArgumentParser(prog="python -m neuro.analysis.matrix", description="what each chip takes")
    parser.add_argument("--write", action="store_true", help=f"put it into {README.name}")
    if parser.parse_args(argv).write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(compat_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
