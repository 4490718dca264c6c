"""`python -m experiments.bench account`: published networks with measured power or time, beside what the account says.

A network is compared where its activity is published or can be counted again, and where the figure was not used for
calibration: the energy of the anchor says nothing about the error of what is scaled from it, its time per step does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.output import add_json_argument, entry, finish
from hardware.datafile import DataFileError
from hardware.energy.account import Board, account
from hardware.energy.breakeven import break_even, standings
from hardware.energy.counts import Counts
from hardware.energy.extrapolate import extrapolate
from hardware.energy.factors import Split, take_apart
from hardware.energy.measured_networks import Layer, Network, load_networks
from hardware.energy.profile import load_profile
from hardware.energy.static_power import static_of_cores
from hardware.interval import Interval
from hardware.latency.estimate import estimate
from hardware.latency.rates import load_rates
from hardware.placement.demand import Convolution

RATES = {"loihi1": ("loihi1_davies2018", "loihi1_sanafe"), "loihi2": ("loihi2_estimated",)}
MIXTURE = "loihi1_davies2018"
REFERENCES = ("digital45_int8_sram", "digital45_fp16_sram", "digital45_fp32_sram", "digital45_int8_dram", "gpu_h100_sheet")
GOLDEN = ("input", "conv-0", "conv-1", "conv-2", "conv-3", "conv-4", "fc-0", "fc-1", "fc-2")
"""Files of the anchor's golden run that hold spikes, in order of layers; the last layer sends none."""

Entry = dict[str, Any]
EMPTY: Entry = {"relative_error": None, "inside_interval": None}


def compare(model: Interval, measured: Interval, unit: str) -> Entry:
    """Status, error of the middle value, and whether what was measured lies inside the model's interval."""
    low, mid, high = model.to(unit)
    value = measured.to(unit)[1]
    return {"status": "compared", "relative_error": round(mid / value - 1, 4), "inside_interval": low <= value <= high}


def energy_entry(network: Network, anchor: Network) -> tuple[Entry, str]:
    """The entry of a network's energy, and a line for people."""
    name = next(
        (key for key in ("total_energy", "dynamic_energy", "total_power", "dynamic_power") if key in network.measured), None
    )
    seen = f"{name.replace('_', ' ')} {network.measured[name].mid}" if name else network.stated or "no power published"
    if network.calibration:
        return {"status": "calibration", **EMPTY}, f"{seen}; the model is calibrated on it"
    if not network.layers:
        return {"status": "counts unpublished", **EMPTY}, f"{seen}; {network.reason}"
    if name not in ("total_energy", "dynamic_energy") or network.chip != anchor.chip or network.steps_per_inference is None:
        return {"status": "counts unpublished", **EMPTY}, f"{seen}; no model for this figure"
    step = network.measured.get("step")
    span = step * network.steps_per_inference if step is not None else None
    chips = Board(network.placed.get("chips", 1), network.placed.get("chips", 1))
    report = extrapolate(network.counts(), anchor, load_profile(MIXTURE), time=span, board=chips if span else None)
    triple = report.dynamic_j if name == "dynamic_energy" else (report.total_low_j, report.total_mid_j, report.total_high_j)
    model = Interval.of(*triple, "J")
    return compare(model, network.measured[name], "J"), f"{seen}; {report.kind}: {model}"


def bounds_entry(network: Network) -> tuple[Entry, str] | None:
    """Whether the dynamic energy lies between no spike at all and a spike of every neuron in every step, and at which rate,
    the same for all neurons, the middle values of both sets meet it; None without an architecture.
    """
    measured = network.measured.get("dynamic_energy")
    if not network.architecture or measured is None or network.chip != "loihi1":
        return None
    value = measured.to("J")[1]
    rates, ends = [], []
    for name in RATES["loihi1"]:  # the profiles have the same names
        quiet, busy = (account(network.extreme_counts(spiking), load_profile(name)) for spiking in (False, True))
        rates.append((value - quiet.total_mid_j) / (busy.total_mid_j - quiet.total_mid_j))
        ends.append((quiet.total_low_j, busy.total_high_j))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    entry = {"status": "bounded", "relative_error": None, "inside_interval": low <= value <= high}
    meets = f"{100 * min(rates):.2g} to {100 * max(rates):.2g} % of neurons and steps"
    spread = f"{1e6 * low:.3g} uJ without a spike, {1e6 * high:.4g} uJ with all of them"
    return entry, f"dynamic energy {measured.mid}; {spread}; middle values meet it at {meets}"


def static_entry(network: Network) -> tuple[Entry, str] | None:
    """Measured static power beside the profile's, times chips; None where either is not known."""
    measured = network.measured.get("static_power")
    if measured is None or network.chip != "loihi1" or "chips" not in network.placed:
        return None
    cost = load_profile(MIXTURE).coefficients["static"]
    assert cost.low is not None
    assert cost.mid is not None
    assert cost.high is not None
    model = Interval(cost.low, cost.mid, cost.high) * network.placed["chips"]
    entry = {"status": "calibration", **EMPTY} if "static_power" in network.calibrates else compare(model, measured, "mW")
    where = f"cores in use: {network.placed['cores']}"
    return entry, f"static power {measured.mid}, {where}; {MIXTURE}: {model}"


def static_cores_entry(network: Network) -> tuple[Entry, str] | None:
    """Measured static power beside that of the cores in use, where their number is published for one chip; else None."""
    measured = network.measured.get("static_power")
    if measured is None or network.chip != "loihi1" or network.placed.get("chips") != 1 or "cores" not in network.placed:
        return None
    model = static_of_cores(network.placed["cores"])
    entry = {"status": "calibration", **EMPTY} if "static_power" in network.calibrates else compare(model, measured, "mW")
    return (
        entry,
        f"static power {measured.mid}, cores in use: {network.placed['cores']}; by cores: {model}, without x86 cores",
    )


def step_entries(network: Network) -> dict[str, tuple[Entry, str]]:
    """Rate file -> the entry of a network's time per step and a line for people; empty without activity or time."""
    if not network.layers or "step" not in network.measured:
        return {}
    placement, counts, found = network.place(), network.counts(), {}
    for name in RATES[network.chip]:
        latency = estimate(counts, placement, load_rates(name))
        entry = compare(latency.step, network.measured["step"], "us")
        low, mid, high = latency.step.to("us")
        at_least = "at least " if latency.lower_bound else ""
        text = f"step {network.measured['step'].mid}; {name}: {at_least}{mid:.3g} us ({low:.3g} to {high:.3g})"
        text += f", set by its {latency.binding} term"
        found[name] = (entry, text)
    return found


def against_fp32(counts: Sequence[Counts]) -> Split:
    """Joules of a dense fp32 reference over those of the chip, the model the same: bits, work left out, and the rest.

    Both references read weights from the same memory, so that their ratio is taken end by end.
    """
    chip = load_profile(MIXTURE)
    wide, narrow = (break_even(counts, chip, load_profile(f"digital45_{kind}_sram")) for kind in ("fp32", "int8"))
    ends = sorted(a / b for a, b in zip(wide.reference_j, narrow.reference_j, strict=True))
    low, mid, high = wide.reference_j[0] / wide.chip_j[2], 1 / wide.factor, wide.reference_j[2] / wide.chip_j[0]
    precision = (ends[0], wide.reference_j[1] / narrow.reference_j[1], ends[2])
    known: dict[str, float | tuple[float, float, float]] = {"algorithm": 1.0, "precision": precision}
    known["sparsity"] = 1 / wide.density
    return take_apart((low, mid, high), known)


def recount(network: Network, folder: Path) -> list[Layer]:
    """The anchor's activity counted again from the golden spikes of its own test suite.

    Args:
        network: the anchor, for its geometry.
        folder: `tests/lava/lib/dl/netx/gts/pilotnet_lif` of the wheel of lava-dl 0.6.0, unpacked.

    Raises:
        OSError, ValueError: a file is missing, or of another shape.
    """
    steps = network.steps_per_inference or 0
    spikes = []
    for start, (name, layer) in enumerate(zip(GOLDEN, network.layers, strict=False)):
        raw = np.load(folder / f"{name}.npy", allow_pickle=False)
        if raw[..., 0].size != layer.neurons or raw.shape[-1] < start + steps:
            raise ValueError(
                f"{name}.npy has shape {raw.shape}; {layer.neurons} neurons and {start + steps} steps are needed"
            )
        spikes.append(raw[..., start : start + steps].astype(np.int64).sum(axis=-1))
    found = []
    for number, (layer, demand) in enumerate(zip(network.layers, network.demands(), strict=True)):
        sent = int(spikes[number].sum()) if number < len(spikes) else 0
        events = synops = macs = 0
        for connection in demand.connections:
            source = spikes[number - 1]
            events = int(source.sum())
            if isinstance(connection, Convolution):
                reach = [np.zeros(size, dtype=np.int64) for size in connection.input_shape[:2]]
                for axis in (0, 1):
                    for at, taps in connection.taps(axis, 0, demand.box[axis]).items():
                        reach[axis][at] = len(taps)
                each = np.outer(*reach) * connection.channels
                synops = int((source.sum(axis=-1) * each).sum())
                macs = int(each.sum()) * connection.input_shape[2]
            else:
                synops, macs = events * layer.neurons, connection.inputs * layer.neurons
        quiet = layer.neurons * steps - sent
        found.append(Layer(layer.name, layer.neurons, events, synops, sent, quiet, macs, layer.geometry))
    return found


def report(networks: Mapping[str, Network]) -> tuple[dict[str, Entry], list[str]]:
    """(the JSON document, lines of the table)."""
    anchor = next(network for network in networks.values() if network.calibration)
    document: dict[str, Entry] = {}
    lines = []
    for name, network in networks.items():
        rows = {name: energy_entry(network, anchor)}
        rows |= {f"{name}.step": pair for pair in step_entries(network).values()}
        others = {"bounds": bounds_entry(network), "static": static_entry(network)}
        others["static_cores"] = static_cores_entry(network)
        rows |= {f"{name}.{key}": pair for key, pair in others.items() if pair is not None}
        for key, (found, text) in rows.items():
            document[key] = found
            error = "" if found["relative_error"] is None else f"{100 * found['relative_error']:+.0f} %, "
            inside = {None: "", True: "inside", False: "OUTSIDE"}[found["inside_interval"]]
            lines.append(f"{key:<24} {network.chip:<7} {found['status']:<19} {error + inside:<17} {text}")
    return document, lines


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON line. Exit code 0; 1 when the recount differs; 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="spikegate bench account", description=str(__doc__).split("\n\n")[0])
    parser.add_argument(
        "--golden", type=Path, default=None, help="folder of golden spikes: count the anchor's activity again"
    )
    add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        networks = load_networks()
        document, lines = report(networks)
        print("\n".join(lines))
        for network in (network for network in networks.values() if network.layers):
            print(f"\n{network.name}: activity {network.counts_method}: {network.counts_source}")
            for note in (network.counts_note, *network.notes):
                print(f"  {note}")
            counts = network.counts()
            for reference in REFERENCES:
                print(f"  {break_even(counts, load_profile(MIXTURE), load_profile(reference)).sentence}")
            print(f"  digital45_fp32_sram over {MIXTURE}: {against_fp32(counts).sentence}")
            for standing in standings(counts):
                print(f"  {standing}")
            if args.golden is not None and network.calibration:
                same = recount(network, args.golden) == list(network.layers)
                print(f"  counted again from {args.golden.name}: {'the same' if same else 'DIFFERENT'}")
                if not same:
                    return 1
    except (OSError, ValueError, DataFileError) as error:
        print(f"bench account: {error}", file=sys.stderr)
        return 2
    finish(document, "bench-account")
    return 0


if __name__ == "__main__":
    sys.exit(main())
