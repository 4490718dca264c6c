"""`to_xylo`: a spiking network in real numbers onto Xylo, chosen by what it does to the outputs on a calibration.

Four things differ from the float network, and each is chosen by the error that it leaves on the calibration's inputs:
decays that are bit shifts (`forms`), up to 31 spikes a step of a hidden neuron, 8-bit weights, and 16-bit states that
saturate (`integers`). Fewer units leave room above a register's peak and round more; how many is found by running the
integers at several rooms, with what saturated counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from hardware.chips.pooled import PooledChip, load_pooled
from hardware.placement import DoesNotFit
from hardware.placement.pooled import place_pooled
from hardware.text import listed, quoted
from neuro.conversion.spiking.arguments import check_input_scale, check_steps
from neuro.conversion.spiking.checking import generated_input
from neuro.conversion.spiking.convert import PrecisionWarning
from neuro.conversion.spiking.description import INPUT, Description, Neurons, NotConvertible, Synapses, run_float
from neuro.conversion.spiking.xylo.forms import Form, FormRun, all_spikes, candidates, relay_form, run_forms
from neuro.conversion.spiking.xylo.integers import FILLED, WEIGHT_LIMIT, Fitter, Made, layers_of
from neuro.conversion.spiking.xylo.network import XyloCheck, XyloConversion, XyloLayer, outputs_of
from neuro.conversion.spiking.xylo.refusals import (
    check_choice,
    check_layers,
    check_pools,
    messages,
    must_be_hidden,
)
from neuro.graph.demand import pooled_demand
from neuro.simulators.fixed_point import simulate

ROOMS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""Peaks of the calibration over what a register holds that are tried; above 1 it saturates on purpose."""
FIRST_ROOM = 2
DROPS = (1.0, 0.0)
"""Shares of what rounding adds to v that the bias takes off."""
FORMS = 4  # forms of a layer that are tried on the calibration
FEW_LEVELS = 32
SATURATED = 1e-3  # share of updates above which saturations are warned of
FAR = 0.1  # error of a kernel or reset above which decays are warned of
BETTER = 0.95  # share of the error without them below which a second current or partners are taken


@dataclass(frozen=True, eq=False)
class _Setting:
    """What stays the same over the choices of neurons; `relays`: outputs that repeat a hidden layer's spikes."""

    description: Description
    relays: frozenset[str]
    chip: PooledChip
    x_BTF: Tensor
    given: Tensor
    input_scale: float
    asked: dict[str, Tensor]
    generated: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """Read-outs."""
        return self.description.outputs


def to_xylo(
    description: Description,
    *,
    chip: str | PooledChip = "xylo_audio2",
    calibration: Tensor | None = None,
    steps: int | None = None,
    input_scale: float = 1.0,
    synapses: int | str = "auto",
    spikes: str = "auto",
) -> XyloConversion:
    """Convert a spiking network in real numbers to Xylo.

    Args:
        description: of the network: `neuro.describe`, or `neuro.exchange.nir.describing.describe(...).description`.
        chip: whose pools it must fit: "xylo_audio2", "xylo_audio3", "xylo_imu", or one's own.
        calibration: inputs (B, T, F) like those to come; everything is chosen on them. None: made up.
        steps: length of made-up samples (default: 64).
        input_scale: float value of one input spike; 0 to 15 arrive at a channel in a step.
        synapses: currents of a hidden neuron: 1; 2, which meets decays between the chip's with twice the synapses; "auto":
            two where they lessen the error on the calibration and the chip has them.
        spikes: "many": a hidden neuron sends up to 31 spikes a step; "one": partner neurons hold those to one that would
            send more on the calibration; "auto": where that lessens the error and fits.

    Returns:
        XyloConversion.

    Raises:
        DoesNotFit: one of the chip's pools is too small; its sizes are looked at before anything else.
        NotConvertible: a reset, a way between layers, an input or a range that Xylo has no counterpart of; with a remedy.
        FileNotFoundError, DataFileError: of a chip.

    Warns:
        PrecisionWarning: decays far from those asked for, few levels of weights, registers that saturate, or an output
            that never spikes on the calibration.
    """
    target = chip if isinstance(chip, PooledChip) else load_pooled(chip)
    if not isinstance(description, Description):
        raise NotConvertible(f"{quoted(description)} is no Description; neuro.describe makes one of a module")
    check_pools(description, target)
    check_choice("synapses", synapses, (1, 2, "auto"))
    check_choice("spikes", spikes, ("many", "one", "auto"))
    check_input_scale(input_scale)
    check_steps(steps)
    if synapses == 2 and target.synapses_per_neuron < 2:
        raise NotConvertible(
            f"synapses is 2, and a hidden neuron of {target.title} has one current; give 1, or another chip"
        )
    check_layers(description)
    generated = calibration is None
    if calibration is None:
        calibration = generated_input(description, steps, float(input_scale), (0, 1))
    given = messages(calibration, description.input_shape, float(input_scale))
    if not given.numel():
        raise NotConvertible("the calibration holds no sample; give inputs like those to come, (samples, steps, inputs)")
    x_BTF = given.double() * float(input_scale)
    floats = run_float(description, x_BTF)
    asked = {
        name: (floats.potentials if description.layer(name).is_readout else floats.spikes)[name]
        for name in description.outputs
    }
    needed = frozenset(must_be_hidden(description))
    spiking = frozenset(name for name in description.outputs if not description.layer(name).is_readout)
    settings = [
        _Setting(_relayed(description, names), names, target, x_BTF, given, float(input_scale), asked, generated)
        for names in dict.fromkeys((needed, spiking))
    ]
    counts: tuple[int, ...] = (synapses,) if isinstance(synapses, int) else (1, 2)
    counts = tuple(count for count in counts if count <= target.synapses_per_neuron)
    silent = [name for name in sorted(spiking) if not bool(asked[name].any())]
    return _warned(_best(settings, counts, spikes), silent)


def _relayed(description: Description, names: frozenset[str]) -> Description:
    """The network with some outputs as hidden layers of another name, and read-outs that repeat their spikes."""
    taken = set(description.layer_names)
    inner: dict[str, str] = {}
    for name in sorted(names):
        inner[name] = f"{name}_hidden"
        while inner[name] in taken:
            inner[name] += "_"
        taken.add(inner[name])
    neurons, synapses = [], []
    for layer in description.neurons:
        neurons.append(replace(layer, name=inner.get(layer.name, layer.name)))
        if layer.name in inner:
            neurons.append(Neurons(layer.name, (layer.size,), alpha=0.5, beta=0.0, threshold=1.0, reset="subtract"))
            synapses.append(Synapses(f"{layer.name}_relay", inner[layer.name], layer.name, np.eye(layer.size)))
    for item in description.synapses:
        source, target = inner.get(item.source, item.source), inner.get(item.target, item.target)
        synapses.append(replace(item, source=source, target=target))
    return replace(description, neurons=tuple(neurons), synapses=tuple(synapses))


@dataclass(frozen=True, eq=False)
class _Option:
    """Currents and spikes of neurons, and what they do in real numbers."""

    name: str
    setting: _Setting
    forms: dict[str, Form]
    partnered: dict[str, np.ndarray]
    single: FormRun
    run: FormRun
    loss: float


def _options(setting: _Setting, counts: tuple[int, ...], spikes: str) -> list[_Option]:
    """What there is to choose from, each with its loss in real numbers."""
    found = []
    for count in counts:
        forms, single = _forms(setting, count)
        need = {name: (single.wanted[name] > 1) & (name not in setting.outputs) for name in forms}
        several = any(flags.any() for flags in need.values())
        for held in {"many": (False,), "one": (True,), "auto": (False, True) if several else (False,)}[spikes]:
            partnered = need if held else {name: np.zeros_like(flags) for name, flags in need.items()}
            limits = all_spikes(setting.description, False, setting.outputs)
            most = {name: np.where(partnered[name], 1, limit) for name, limit in limits.items()}
            run = run_forms(setting.description, forms, setting.x_BTF, most)
            loss = _loss(setting, _outputs(setting, run))
            found.append(_Option(_said(setting, count, held), setting, forms, partnered, single, run, loss))
    return found


def _best(settings: list[_Setting], counts: tuple[int, ...], spikes: str) -> XyloConversion:
    """The conversion with the least loss; of two that are about equal the one with fewer hidden neurons and synapses."""
    best: XyloConversion | None = None
    refused: Exception | None = None
    tried = []
    options = [option for setting in settings for option in _options(setting, counts, spikes)]
    for option in sorted(options, key=lambda option: option.loss):
        if best is not None and option.loss >= best.check.loss:
            tried.append(f"{option.name}: without rounding already a loss of {option.loss:.3f}")
            continue
        try:
            found = _converted(option)
        except (NotConvertible, DoesNotFit) as error:
            refused = refused or error
            tried.append(f"{option.name}: refused, {error}")
            continue
        tried.append(f"{option.name}: {_price(found)}, loss {found.check.loss:.3f}")
        if best is None or _is_better(found, best):
            best = found
    if best is None:
        assert refused is not None
        raise refused
    if len(tried) > 1:
        best = replace(best, notes=(*best.notes, *(f"tried {each}" for each in tried)))
    return best


def _is_better(one: XyloConversion, other: XyloConversion) -> bool:
    """Whether its loss is less; a larger network must lessen it by a twentieth."""
    larger = _size(one) > _size(other)
    factor = BETTER if larger else 1 / BETTER if _size(one) < _size(other) else 1.0
    return one.check.loss < factor * other.check.loss - 1e-9


def _size(network: XyloConversion) -> tuple[int, int]:
    """Hidden neurons and synapses."""
    synapses = sum(int((p.weight != 0).sum()) for p in network.graph.projections)
    return network.placement.used["hidden"].used, synapses


def _said(setting: _Setting, count: int, held: bool) -> str:
    relayed = f", {listed(sorted(setting.relays))} hidden with relays" if setting.relays else ""
    spikes = "one spike a step by partners" if held else "up to 31 spikes"
    return f"{count} current{'s' * (count > 1)} a neuron, {spikes}{relayed}"


def _price(found: XyloConversion) -> str:
    return "{:,} hidden neurons, {:,} synapses".format(*_size(found))


def _forms(setting: _Setting, count: int) -> tuple[dict[str, Form], FormRun]:
    """A form for each layer by the outputs' error with one spike a step, layer by layer in their order."""
    description = setting.description
    steps = setting.x_BTF.shape[1]
    names = list(description.depths())[1:]
    choices = {}
    for name in names:
        output = name in setting.outputs
        if name in setting.relays:
            choices[name] = [relay_form(description.layer(name).size)]
            continue
        choices[name] = candidates(description.layer(name), steps, 1 if output else count, not output, FORMS)
    chosen = {name: forms[0] for name, forms in choices.items()}
    single = all_spikes(description, True, setting.outputs)
    best = run_forms(description, chosen, setting.x_BTF, single)
    least = _loss(setting, _outputs(setting, best))
    for name in names:
        for form in choices[name][1:]:
            if form.error > 4 * choices[name][0].error + 0.02:
                continue
            trial = {**chosen, name: form}
            run = run_forms(description, trial, setting.x_BTF, single)
            loss = _loss(setting, _outputs(setting, run))
            if loss < BETTER * least - 1e-9:
                chosen, best, least = trial, run, loss
    return chosen, best


def _outputs(setting: _Setting, run: FormRun) -> dict[str, Tensor]:
    layer = setting.description.layer
    return {name: (run.potentials if layer(name).is_readout else run.spikes)[name] for name in setting.description.outputs}


def _agreement(setting: _Setting, found: Mapping[str, Tensor]) -> float:
    """Share of samples with the winner of the float network, of the first output."""
    name = setting.description.outputs[0]
    winners = [values[name].sum(dim=1).argmax(dim=1) for values in (found, setting.asked)]
    return float((winners[0] == winners[1]).double().mean())


def _error(setting: _Setting, found: Mapping[str, Tensor]) -> float:
    """Root of the squared difference over that of what was asked: of spikes per sample, or of v at every step."""
    wrong = size = 0.0
    for name, asked in setting.asked.items():
        ours = found[name]
        if not setting.description.layer(name).is_readout:
            asked, ours = asked.sum(dim=1), ours.sum(dim=1)
        scale = max(float((asked**2).sum()), 1e-12)
        wrong += float(((ours - asked) ** 2).sum()) / scale
        size += 1
    return float(np.sqrt(wrong / size))


def _loss(setting: _Setting, found: Mapping[str, Tensor]) -> float:
    return 1 - _agreement(setting, found) + _error(setting, found)


def _converted(option: _Option) -> XyloConversion:
    """The integers with the least loss: from a room of 1 on into the direction that lessens it."""
    setting, run = option.setting, option.run
    description = setting.description
    agreements = (_agreement(setting, _outputs(setting, option.single)), _agreement(setting, _outputs(setting, run)))
    rates = {name: (spikes**2).mean(dim=(0, 1)).numpy() for name, spikes in run.spikes.items()}
    rates[INPUT] = (setting.given.double() ** 2).mean(dim=(0, 1)).numpy()
    layers = layers_of(
        description, option.forms, setting.outputs, setting.input_scale, rates, run.currents, run.peaks,
        option.partnered, setting.relays,
    )  # fmt: skip
    fitter = Fitter(description, layers, option.partnered)
    refused: list[NotConvertible] = []

    @cache
    def tried(place: int, drop: float) -> XyloConversion | None:
        if not 0 <= place < len(ROOMS):
            return None
        try:
            made = fitter.made(ROOMS[place], drop, _meta(setting))
        except NotConvertible as error:
            refused.append(error)
            return None
        return _measured(setting, option.forms, made, agreements)

    def loss(place: int, drop: float) -> float:
        found = tried(place, drop)
        return float("inf") if found is None else found.check.loss

    place, drop = (
        next((place for place in (FIRST_ROOM, *range(len(ROOMS))) if tried(place, DROPS[0]) is not None), FIRST_ROOM),
        DROPS[0],
    )
    for direction in (-1, 1):
        while loss(place + direction, drop) < loss(place, drop):
            place += direction
    drop = min(DROPS, key=lambda share: loss(place, share))
    found = tried(place, drop)
    if found is None:
        raise refused[0]
    return found


def _meta(setting: _Setting) -> dict[str, Any]:
    depths = {name: depth for name, depth in setting.description.depths().items() if name != INPUT}
    return {"route": "xylo", "chip": setting.chip.name, "input_scale": setting.input_scale, "depths": depths}


def _measured(setting: _Setting, forms: Mapping[str, Form], made: Made, agreements: tuple[float, float]) -> XyloConversion:
    """Run the integers on the calibration, and hold them against the float network."""
    description = setting.description
    placement = place_pooled(pooled_demand(made.graph), setting.chip)
    depths = {name: depth for name, depth in description.depths().items() if name != INPUT}
    readouts = tuple(name for name in description.outputs if description.layer(name).is_readout)
    records = tuple(_record(setting, forms[name], made, name) for name in depths)
    nothing = XyloCheck(
        len(setting.given), setting.given.shape[1], setting.generated, 0.0, 0.0, agreements[0], agreements[1], 0.0, 0, 0
    )
    network = XyloConversion(
        made.graph, records, setting.input_scale, depths, readouts, placement, nothing, _notes(setting, forms, made),
        description, made.places, made.partnered, made.units,
    )  # fmt: skip
    record = ["spikes", *(f"{name}.v_mem" for name in readouts)]
    activity = simulate(made.graph, network.present(setting.x_BTF), mode="xylo", record=record)
    found = outputs_of(network, activity)
    hidden = [name for name in depths if name not in setting.outputs]
    several = [network.spikes_of(activity, name) > 1 for name in hidden]
    counts = [activity.populations[name] for name in depths]
    check = replace(
        nothing,
        class_agreement=_agreement(setting, found),
        output_error=_error(setting, found),
        several=sum(int(each.sum()) for each in several) / max(1, sum(each.numel() for each in several)),
        saturations=sum(count.saturations_v for count in counts),
        updates=sum(count.updates_active + count.updates_inactive for count in counts),
    )
    return replace(network, check=check)


def _record(setting: _Setting, form: Form, made: Made, name: str) -> XyloLayer:
    layer, units = setting.description.layer(name), made.units[name]
    each = units if layer.is_readout else np.rint(layer.threshold * units)
    return XyloLayer(
        name=name,
        kind=made.graph.population(name).kind,
        asked=(float(layer.alpha.mean()), float(layer.beta.mean())),
        dash_syn=tuple(int(row[0]) for row in form.dash_syn),
        dash_mem=int(form.dash_mem[0]),
        kernel_error=form.kernel_error,
        reset_error=form.reset_error,
        loops=bool(np.any(form.own)),
        units=(round(float(each.min())), round(float(each.max()))),
        levels=made.levels[name],
        partners=int(made.partnered[name].sum()),
    )


def _notes(setting: _Setting, forms: Mapping[str, Form], made: Made) -> tuple[str, ...]:
    description = setting.description
    notes = list(description.notes)
    if several := [layer.name for layer in description.neurons if len(np.unique(forms[layer.name].dash_mem)) > 1]:
        notes.append(f"{listed(several)}: decays differ from neuron to neuron; the first one's are shown")
    if biased := [layer.name for layer in description.neurons if layer.biased]:
        notes.append(
            f"{listed(biased)}: a bias acts from the first step of a run, before a sample's first spike has come that far,"
            " and that of a current as what it ends at"
        )
    held = sum(int(flags.sum()) for flags in made.partnered.values())
    if held:
        notes.append(
            f"{held} partner neurons send {FILLED} spikes at every step, which their aliases add to those of a neuron, so"
            " that it can add one: as many hidden neurons more, and that traffic at every step. What it costs the chip in"
            " time and energy is not published"
        )
    return tuple(notes)


def _warned(network: XyloConversion, silent: list[str]) -> XyloConversion:
    found, said = [], []
    for layer in network.layers:
        if max(layer.kernel_error, layer.reset_error) > FAR:
            found.append(
                f"{layer.name}: Xylo has no decays near alpha {layer.asked[0]:.4g}, beta {layer.asked[1]:.4g}; of"
                f" a spike's effect {100 * layer.kernel_error:.0f} % differs, of a reset's {100 * layer.reset_error:.0f} %."
                " Train with decays of 1 - 2^-k: 0.5, 0.75, 0.875, ..."
            )
        low = min(layer.levels.values(), default=WEIGHT_LIMIT)
        if layer.levels and low < FEW_LEVELS:
            found.append(f"{layer.name}: its largest weight of a pool keeps {low} of {WEIGHT_LIMIT} levels")
    check = network.check
    if check.saturations > SATURATED * check.updates:
        found.append(
            f"registers met their ends {check.saturations:,} times in {check.updates:,} updates of the calibration"
        )
    if found:
        said.append(f"the conversion to Xylo loses much: {'; '.join(found)}. Now {check}")
    if silent:
        said.append(
            f"{listed(silent)}: the float network sends no spike on the calibration, so that the check compares nothing."
            " Give inputs that make it spike, or longer samples"
        )
    if said:
        warnings.warn(". ".join(said), PrecisionWarning, stacklevel=3)
    return network
