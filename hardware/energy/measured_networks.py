"""Published networks with measured power or time (``networks/*.yaml``), with their activity where it can be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.energy.counts import Counts
from hardware.interval import Interval
from hardware.placement import place
from hardware.placement.demand import Connection, Convolution, LayerDemand
from hardware.placement.report import Placement
from hardware.text import quoted

METHODS = ("measured", "recomputed", "published")
MEASURED: Mapping[str, str] = MappingProxyType(
    {
        "step": "time",
        "total_power": "power",
        "static_power": "power",
        "dynamic_power": "power",
        "total_energy": "energy",
        "dynamic_energy": "energy",
    }
)
"""What may be measured, and its dimension; energies are per inference (one frame, one token)."""
_REQUIRED = ("title", "chip", "source", "method", "date", "steps_per_inference", "measured", "counts")
_LAYER = ("neurons", "events", "synops", "active", "inactive", "dense_macs")
_GEOMETRY = ("shape", "kernel", "stride", "padding", "weight_bits")


@dataclass(frozen=True)
class Layer:
    """Activity of one layer over one inference, and its geometry; layers stand in series."""

    name: str
    neurons: int
    events: int
    synops: int
    active: int
    inactive: int
    dense_macs: int
    geometry: Mapping[str, Any]


@dataclass(frozen=True)
class Population:
    """Neurons of a published architecture, and the populations whose every neuron each of them listens to."""

    name: str
    neurons: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """One published network.

    Attributes:
        calibration: a model is calibrated on it, so that it says nothing about that model's error.
        calibrates: what else of it went into a profile, by names of :data:`MEASURED`.
        stated: what was published where no figure in joules, watts or seconds could be read; else "".
        steps_per_inference: None where it is not published.
        measured: name of :data:`MEASURED` -> value; without a published spread all three are equal.
        layers: activity, in order; empty where it is not published, and ``reason`` says so.
        architecture: populations where sizes and connections are published without activity; empty otherwise.
        counts_source, counts_method, counts_note: where the activity comes from.
        placed: how to place it (budget, split), and the cores and chips that were published.
    """

    name: str
    title: str
    chip: str
    source: str
    method: str
    date: str
    calibration: bool
    steps_per_inference: int | None
    measured: Mapping[str, Interval]
    notes: tuple[str, ...]
    layers: tuple[Layer, ...]
    counts_source: str
    counts_method: str
    counts_note: str
    reason: str
    placed: Mapping[str, Any]
    calibrates: tuple[str, ...] = ()
    stated: str = ""
    architecture: tuple[Population, ...] = ()

    def extreme_counts(self, spiking: bool) -> list[Counts]:
        """Counts of one inference in which every neuron sends in every step, or none ever does: bounds on any activity.

        Populations without sources are inputs; whether they are neurons of the chip is not always published, so that
        they count where everything spikes and not where nothing does.

        Raises:
            ValueError: its architecture or its steps per inference are not published.
        """
        if not self.architecture or self.steps_per_inference is None:
            raise ValueError(f"{self.name}: no architecture with its steps per inference is published")
        steps, sizes = self.steps_per_inference, {item.name: item.neurons for item in self.architecture}
        found = []
        for item in self.architecture:
            inputs = sum(sizes[source] for source in item.sources)
            updates = item.neurons * steps if spiking or item.sources else 0
            found.append(
                Counts(
                    item.name,
                    tokens=1,
                    synops=inputs * item.neurons * steps if spiking else 0,
                    events=inputs * steps if spiking else 0,
                    neuron_updates_active=updates if spiking else 0,
                    neuron_updates_inactive=0 if spiking else updates,
                    dense_macs=inputs * item.neurons,
                    weight_bytes=0,
                    graded=False,
                    payload_bits=1,
                    time_steps=steps,
                )
            )
        return found

    def counts(self) -> list[Counts]:
        """Counts of one inference as one token; a layer without incoming synapses counts its neurons alone.

        Raises:
            ValueError: its activity is not published.
        """
        if not self.layers or self.steps_per_inference is None:
            raise ValueError(f"{self.name}: counts unpublished: {self.reason}")
        return [
            Counts(
                layer.name,
                tokens=1,
                synops=layer.synops,
                events=layer.events,
                neuron_updates_active=layer.active,
                neuron_updates_inactive=layer.inactive,
                dense_macs=layer.dense_macs,
                weight_bytes=0,
                graded=False,
                payload_bits=1,
                time_steps=self.steps_per_inference,
            )
            for layer in self.layers
        ]

    def demands(self) -> list[LayerDemand]:
        """What it asks of the chip, with the published activity as rates.

        Raises:
            ValueError: its activity is not published.
        """
        found: list[LayerDemand] = []
        for layer, item in zip(self.layers, self.counts(), strict=True):
            geometry, shape = layer.geometry, tuple(layer.geometry.get("shape", (layer.neurons, 1, 1)))
            connections: tuple[Connection | Convolution, ...] = ()
            if found and "kernel" in geometry:
                connections = (
                    Convolution(
                        found[-1].name,
                        found[-1].box,
                        channels=shape[2],
                        kernel=tuple(geometry["kernel"]),
                        stride=tuple(geometry["stride"]),
                        padding=tuple(geometry["padding"]),
                        weight_bits=geometry["weight_bits"],
                    ),
                )
            elif found:
                connections = (Connection(found[-1].name, found[-1].neurons, geometry["weight_bits"]),)
            rate = item.neuron_updates_active / (layer.neurons * item.time_steps)
            found.append(LayerDemand(layer.name, layer.neurons, connections, shape=shape, rate=rate, measured=True))
        return found

    def place(self) -> Placement:
        """On its chip, as it was published."""
        return place(self.demands(), self.chip, budget=self.placed.get("budget"), split=self.placed.get("split", "fewest"))


def load_networks() -> dict[str, Network]:
    """All shipped networks by name.

    Raises:
        DataFileError: unknown, missing or repeated key; a wrong unit; no source; counts and a reason for having none.
    """
    found: dict[str, Network] = {}
    for file in datafile.names("networks"):
        for name, network in read_networks(datafile.locate(file, "networks")).items():
            if name in found:
                raise DataFileError(f"{file}.yaml: network {quoted(name)} stands in another file too")
            found[name] = network
    return found


def read_networks(path: Path) -> dict[str, Network]:
    """The networks of one file; errors as in :func:`load_networks`."""
    entry = datafile.check_keys(path.name, datafile.read(path), ("schema", "networks"))
    if entry["schema"] != 1:
        raise DataFileError(f"{path.name}: schema {quoted(entry['schema'])} is not known; this version reads schema 1")
    if not isinstance(entry["networks"], dict) or not entry["networks"]:
        raise DataFileError(f"{path.name}: networks: expected networks by name")
    return {str(name): _network(f"{path.name}: {name}", str(name), raw) for name, raw in entry["networks"].items()}


def _network(where: str, name: str, raw: object) -> Network:
    entry = datafile.check_keys(
        where, raw, _REQUIRED, ("role", "reason", "placement", "calibrates", "stated", "architecture")
    )
    if (entry["counts"] is None) != ("reason" in entry):
        raise DataFileError(f"{where}: counts, or null and the reason why there are none")
    steps = entry["steps_per_inference"]
    if steps is not None:
        steps = _whole(f"{where}: steps_per_inference", steps, 1)
    measured, notes = {}, []
    for key, item in datafile.check_keys(f"{where}: measured", entry["measured"], (), tuple(MEASURED)).items():
        spot = f"{where}: measured: {key}"
        item = datafile.check_keys(spot, item, ("value", "unit"), ("low", "high", "note"))
        triple = (item.get("low", item["value"]), item["value"], item.get("high", item["value"]))
        measured[key] = datafile.interval(spot, triple, str(item["unit"]), MEASURED[key])
        if "note" in item:
            notes.append(f"{key}: {datafile.text(spot, item['note'])}")
    if not measured and "stated" not in entry:
        raise DataFileError(f"{where}: nothing measured, and not stated what was published instead")
    calibrates = datafile.texts(f"{where}: calibrates", entry.get("calibrates", []))
    for name_of in calibrates:
        datafile.choice(f"{where}: calibrates", name_of, tuple(measured))
    layers, origin = _counts(f"{where}: counts", entry["counts"])
    placement = entry.get("placement", {})
    return Network(
        name=name,
        title=datafile.text(f"{where}: title", entry["title"]),
        chip=datafile.text(f"{where}: chip", entry["chip"]),
        source=datafile.text(f"{where}: source", entry["source"]),
        method=datafile.choice(f"{where}: method", entry["method"], METHODS),
        date=datafile.iso_date(f"{where}: date", entry["date"]),
        calibration=datafile.choice(f"{where}: role", entry.get("role", "compared"), ("calibration", "compared"))
        == "calibration",
        steps_per_inference=steps,
        measured=MappingProxyType(measured),
        notes=tuple(notes),
        layers=layers,
        counts_source=origin["source"],
        counts_method=origin["method"],
        counts_note=origin["note"],
        reason=datafile.text(f"{where}: reason", entry["reason"]) if "reason" in entry else "",
        placed=datafile.check_keys(f"{where}: placement", placement, (), ("budget", "split", "cores", "chips")),
        calibrates=calibrates,
        stated=datafile.text(f"{where}: stated", entry["stated"]) if "stated" in entry else "",
        architecture=_architecture(f"{where}: architecture", entry.get("architecture")),
    )


def _architecture(where: str, raw: object) -> tuple[Population, ...]:
    if raw is None:
        return ()
    entry = datafile.check_keys(where, raw, ("source", "date", "populations"))
    datafile.text(f"{where}: source", entry["source"])
    datafile.iso_date(f"{where}: date", entry["date"])
    if not isinstance(entry["populations"], dict):
        raise DataFileError(f"{where}: populations: expected populations by name")
    found = []
    for name, item in entry["populations"].items():
        item = datafile.check_keys(f"{where}: {name}", item, ("neurons", "from"))
        sources = datafile.texts(f"{where}: {name}: from", item["from"])
        for source in sources:
            datafile.choice(f"{where}: {name}: from", source, tuple(map(str, entry["populations"])))
        found.append(Population(str(name), _whole(f"{where}: {name}: neurons", item["neurons"], 1), sources))
    return tuple(found)


def _counts(where: str, raw: object) -> tuple[tuple[Layer, ...], dict[str, str]]:
    if raw is None:
        return (), {"source": "", "method": "", "note": ""}
    entry = datafile.check_keys(where, raw, ("source", "method", "date", "layers"), ("note",))
    datafile.iso_date(f"{where}: date", entry["date"])
    if not isinstance(entry["layers"], dict):
        raise DataFileError(f"{where}: layers: expected layers by name")
    layers = []
    for name, item in entry["layers"].items():
        item = datafile.check_keys(f"{where}: {name}", item, _LAYER, _GEOMETRY)
        numbers = {key: _whole(f"{where}: {name}: {key}", item[key], 0) for key in _LAYER}
        layers.append(Layer(name=str(name), geometry={key: item[key] for key in _GEOMETRY if key in item}, **numbers))
    origin = {
        "source": datafile.text(f"{where}: source", entry["source"]),
        "method": datafile.choice(f"{where}: method", entry["method"], METHODS),
        "note": datafile.text(f"{where}: note", entry["note"]) if "note" in entry else "",
    }
    return tuple(layers), origin


def _whole(where: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise DataFileError(f"{where}: expected a whole number from {low}, got {quoted(value)}")
    return value
