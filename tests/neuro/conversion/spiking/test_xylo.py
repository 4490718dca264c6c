"""Networks on Xylo: beside their float run, beside xylosim, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neuro
from hardware.placement import DoesNotFit
from neuro.conversion.spiking.convert import PrecisionWarning
from neuro.conversion.spiking.description import INPUT, Description, Neurons, NotConvertible, Synapses, run_float
from neuro.conversion.spiking.xylo.forms import candidates, kept
from neuro.conversion.spiking.xylo.network import XyloConversion
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.xylo import client
from tests.environments import python_of
from tests.neuro.conversion.spiking import xylo_descriptions as made
from tests.published import published


def converted(description: Description, x: Tensor, **options: Any) -> XyloConversion:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        return neuro.to_xylo(description, calibration=x, **options)


def beside_float(network: XyloConversion, description: Description, x: Tensor) -> tuple[float, float]:
    """Share of samples with the same winner, and the outputs' relative error."""
    floats, (found, _) = run_float(description, x), network.run(x)
    name = description.outputs[0]
    if description.layer(name).is_readout:
        asked, ours = floats.potentials[name], found[name]
    else:
        asked, ours = floats.spikes[name].sum(dim=1), found[name].sum(dim=1)
        assert float(found[name].max()) <= 1
    error = float(((ours - asked) ** 2).sum().sqrt() / (asked**2).sum().sqrt())
    winners = (found[name].sum(dim=1).argmax(dim=1), (asked.sum(dim=1) if asked.ndim == 3 else asked).argmax(dim=1))
    return float((winners[0] == winners[1]).double().mean()), error


@pytest.mark.parametrize("seed", [0, 2, 3, 6, 8, 14])
def test_decays_of_the_chip_give_the_winners_of_the_float_network(seed: int) -> None:
    """Plain and current-based neurons, loops, delayed resets, biases, values: on inputs that chose nothing."""
    description = made.description(seed)
    network = converted(description, made.samples(description, seed, 8, 30))
    same, error = beside_float(network, description, made.samples(description, seed + 1000, 30, 30))
    assert all(layer.kernel_error < 1e-6 for layer in network.layers)
    assert same >= 0.95, network.table()
    assert error < 0.12, network.table()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_forty_networks_keep_their_winners() -> None:
    shares = []
    for seed in range(40):
        description = made.description(seed)
        network = converted(description, made.samples(description, seed))
        shares.append(beside_float(network, description, made.samples(description, seed + 1000, 30))[0])
    assert np.mean(shares) > 0.94
    assert np.median(shares) == 1


def test_every_spike_and_state_equals_xylosim() -> None:
    """With partners, relays, two currents and values, at whatever saturates."""
    python = python_of(client.ENV_PYTHON, ".venv-xylo", "xylo")
    jobs, partners, second, relays = [], 0, 0, 0
    for seed in range(6):
        description = made.description(seed, on_grid=seed % 2 == 0)
        if seed == 5:  # an output that feeds itself is hidden, with a relay
            description = replace(
                description, synapses=(*description.synapses, Synapses("own", "y", "y", -0.3 * np.eye(3)))
            )
        x = made.samples(description, seed, 3, 20)
        network = converted(description, x, spikes="one" if seed % 3 == 0 else "auto")
        jobs.append((network.graph, network.present(x)))
        partners += sum(layer.partners for layer in network.layers)
        second += any(len(layer.dash_syn) == 2 for layer in network.layers)
        relays += "y_hidden" in network.depths
    for (graph, inputs), theirs in zip(jobs, client.run_all(jobs, python=python), strict=True):
        found = compare(theirs, simulate(graph, inputs, mode="xylo", record=RECORD_ALL))
        assert found.equal, found
        assert found.values > 2_000
    assert partners > 5
    assert second
    assert relays


def strong(reset_delayed: bool = False) -> Description:
    """Two neurons that are driven to many thresholds in a step, a loop, and a read-out."""
    return Description(
        (2,),
        (
            Neurons("h", (3,), alpha=0.5, beta=0.875, threshold=1.0, reset="subtract", reset_delayed=reset_delayed),
            Neurons("y", (2,), alpha=0.5, beta=0.75, threshold=4.0, reset="subtract"),
        ),
        (
            Synapses("in", INPUT, "h", [[1.5, 0.2], [0.1, 0.2], [0.0, 1.0]]),
            Synapses("loop", "h", "h", [[0.4, 0.0, -0.2], [0.1, 0.1, 0.0], [0.3, 0.0, 0.2]]),
            Synapses("out", "h", "y", [[1.0, 0.5, -0.2], [-0.3, 0.7, 1.0]]),
        ),
        ("y",),
    )


def test_partners_hold_neurons_to_one_spike_a_step_and_nothing_hears_them() -> None:
    description = strong()
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(4, 20, 2, generator=generator) < 0.4).double()
    many, one = (converted(description, x, spikes=spikes, synapses=1) for spikes in ("many", "one"))
    assert int(many.spikes_of(many.run(x)[1], "h").max()) > 2
    held = one.spikes_of(one.run(x)[1], "h")
    assert one.layers[0].partners == int(one.partnered["h"].sum()) > 0
    assert int(held[..., torch.from_numpy(one.partnered["h"])].max()) == 1
    assert beside_float(many, description, x)[1] > 3 * beside_float(one, description, x)[1]
    floats = run_float(description, x).spikes["h"]
    assert float((held == floats).double().mean()) > 0.97
    auto = converted(description, x, synapses=1)
    assert "tried 1 current a neuron, one spike a step by partners" in auto.table()
    assert auto.layers[0].partners > 0  # by itself, as it lessens the error
    assert one.placement.used["hidden"].used == 3 + one.layers[0].partners


def test_a_plain_neuron_is_exact_by_a_current_that_is_v_and_a_loop_for_the_reset() -> None:
    """Its kernel is beta^n, and Xylo's current lets through (1 - 2^-k)^n; that v holds nothing makes them the same."""
    neurons = Neurons("h", (4,), alpha=0.0, beta=0.875, reset="subtract")
    best = candidates(neurons, 60, 1, True, 3)[0]
    assert best.dash_mem.tolist() == [0] * 4
    assert best.dash_syn.tolist() == [[3] * 4]
    np.testing.assert_allclose(best.gain, 1.0)
    np.testing.assert_allclose(best.own, -0.875)
    assert best.error < 1e-9
    no_loop = candidates(neurons, 60, 1, False, 9)
    assert min(form.reset_error for form in no_loop if form.kernel_error < 1e-9) > 0.5  # a read-out has none
    between = Neurons("h", (4,), alpha=0.75, beta=0.8, reset="subtract")
    one, two = (candidates(between, 60, currents, True, 1)[0] for currents in (1, 2))
    assert two.error < 0.5 * one.error
    impulse, v, i = [], 0.0, np.ones(2)
    for _ in range(60):  # the chosen currents, step by step
        v = float(kept(two.dash_mem[0])) * v + float(i @ two.gain[:, 0])
        i = i * kept(two.dash_syn[:, 0])
        impulse.append(v)
    asked = [sum(0.75**j * 0.8 ** (n - j) for j in range(n + 1)) for n in range(60)]
    assert np.linalg.norm(np.subtract(impulse, asked)) / np.linalg.norm(asked) == pytest.approx(two.kernel_error)


def test_far_decays_are_warned_of_and_the_table_says_what_was_asked_and_what_is_there() -> None:
    description = strong()
    far = replace(description, neurons=(description.neurons[0], replace(description.neurons[1], alpha=0.0, beta=0.3)))
    x = made.samples(description, 0, 4, 20)
    with pytest.warns(PrecisionWarning, match=r"y: Xylo has no decays near alpha 0, beta 0.3.*1 - 2\^-k"):
        network = neuro.to_xylo(far, calibration=x)
    text = network.table()
    assert "y (xylo_out): asked alpha" in text
    assert "XyloAudio 2 (SYNS61201): fits" in text
    assert "saturations in" in text
    with pytest.raises(NotConvertible, match="there is no layer 'z'"):
        network.collect(torch.zeros(1, 25, 2), "z")


@pytest.mark.parametrize(
    ("steps", "counts", "least"),
    [(100, (8, 60), 0.6), pytest.param(256, (30, 300), 0.78, marks=pytest.mark.soak)],
    ids=["short", "whole"],
)
def test_braille_of_the_nir_paper_keeps_most_winners(steps: int, counts: tuple[int, int], least: float) -> None:
    """Decays 0.85, 0.45 and 0.7 lie between the chip's, and its neurons are driven to 20 thresholds in a step."""
    pytest.importorskip("nir", reason="nir is not installed")
    from neuro.exchange.nir.describing import describe
    from neuro.exchange.nir.loading import load_nir

    file = load_nir(published("nir_paper/braille_noDelay_noBias_subtract.nir"))
    description = describe(file, 1e-4, reset="subtract").description
    generator = torch.Generator().manual_seed(7)
    seen, fresh = ((torch.rand(count, steps, 12, generator=generator) < 0.1).double() for count in counts)
    options = {} if steps == 256 else {"synapses": 2, "spikes": "one"}
    network = converted(description, seen, **options)
    assert beside_float(network, description, fresh)[0] > least
    assert network.layers[0].partners
    if steps == 256:
        many = converted(description, seen, spikes="many")
        assert beside_float(many, description, fresh)[0] < least - 0.1
        return
    with pytest.raises(NotConvertible, match=r"a hidden neuron of XyloIMU .* has one current"):
        neuro.to_xylo(description, chip="xylo_imu", calibration=seen, synapses=2)
    with pytest.raises(NotConvertible, match=r"its v goes to 0 .* reset='subtract'"):
        neuro.to_xylo(describe(file, 1e-4, reset="zero").description, calibration=seen)


def sized(inputs: int, hidden: int, reset: str = "subtract") -> Description:
    return Description(
        (inputs,),
        (Neurons("h", (hidden,), alpha=0.5, beta=0.75, reset=reset), Neurons("y", (2,), alpha=0.5, beta=0.75, reset=reset)),
        (
            Synapses("in", INPUT, "h", np.full((hidden, inputs), 0.2)),
            Synapses("out", "h", "y", np.full((2, hidden), 0.1)),
        ),
        ("y",),
    )


def test_the_pools_are_looked_at_before_anything_else() -> None:
    with pytest.raises(DoesNotFit, match=r"hidden 1,001 of 1,000.*fewer or smaller hidden layers") as caught:
        neuro.to_xylo(sized(4, 1001, "zero"), synapses="seven", calibration=torch.full((1, 2, 3), torch.nan))
    assert caught.value.binding.resource == "hidden"
    with pytest.raises(DoesNotFit, match=r"inputs 17 of 16.*summing neighbouring"):
        neuro.to_xylo(sized(17, 4, "zero"))
    with pytest.raises(DoesNotFit, match=r"hidden 500 of 496.*chip xylo_audio2; chip xylo_audio3"):
        neuro.to_xylo(sized(4, 500), chip="xylo_imu")
    assert neuro.to_xylo(sized(4, 5), steps=8, chip="xylo_imu", spikes="many").placement.chip == "xylo_imu"


def test_a_calibration_without_output_spikes_is_warned_of() -> None:
    """Winners of silence agree, whatever the integers do: such a check says nothing."""
    description = sized(3, 4)
    with pytest.warns(PrecisionWarning, match=r"y: the float network sends no spike .* Give inputs that make it spike"):
        neuro.to_xylo(description, calibration=torch.zeros(2, 8, 3))
    busy = torch.ones(2, 30, 3)
    assert float(run_float(description, busy.double()).spikes["y"].sum()) > 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        neuro.to_xylo(description, calibration=busy)
    assert not [warning for warning in caught if "sends no spike" in str(warning.message)]


def changed(number: int = 0, **changes: Any) -> Description:
    base = sized(3, 4)
    neurons = list(base.neurons)
    neurons[number] = replace(neurons[number], **changes)
    return replace(base, neurons=tuple(neurons))


def skipping() -> Description:
    base = sized(3, 4)
    mid = Neurons("m", (4,), alpha=0.5, beta=0.5, reset="subtract")
    ways = (Synapses("mid", "h", "m", np.eye(4)), Synapses("late", "m", "y", np.ones((2, 4))))
    return replace(base, neurons=(*base.neurons, mid), synapses=(*base.synapses, *ways))


@pytest.mark.parametrize(
    ("description", "options", "message"),
    [
        (changed(reset="zero"), {}, "h: its v goes to 0 with a spike.*reset_mechanism='subtract'"),
        (changed(reset="none"), {}, "h: it has a threshold and no reset.*or make it a read-out"),
        (changed(alpha=1.0), {}, r"h: its current never decays \(alpha 1\).*alpha below 1"),
        (skipping(), {}, "synapses 'out': they pass over 1 layers.*Leave the way out"),
        (sized(3, 4), {"calibration": torch.full((1, 4, 3), 16.0)}, r"takes 0..15 spikes a step.*reach over 16..16"),
        (sized(3, 4), {"calibration": torch.full((1, 4, 3), 0.5)}, "another input_scale"),
        (sized(3, 4), {"calibration": -torch.ones(1, 4, 3)}, "0..15 spikes"),
        (
            sized(3, 4),
            {"calibration": torch.ones(1, 4, 5)},
            r"input has shape \(1, 4, 5\); \(samples, steps, 3\) is needed",
        ),
        (sized(3, 4), {"calibration": torch.ones(0, 4, 3)}, "holds no sample"),
        (sized(3, 4), {"synapses": 3}, "synapses is 3; it is one of 1, 2, auto"),
        (sized(3, 4), {"spikes": True}, "spikes is True; it is one of many, one, auto"),
        (sized(3, 4), {"calibration": torch.ones(1, 4, 3, dtype=torch.complex64)}, "complex64; real numbers are needed"),
        (sized(3, 4), {"input_scale": 0}, "input_scale is 0; a finite number above 0"),
        (sized(3, 4), {"input_scale": float("inf")}, "input_scale is inf; a finite number above 0"),
        (sized(3, 4), {"steps": 0}, r"steps is 0; a whole number 1\.\.65535"),
        (sized(3, 4), {"steps": 1.5}, r"steps is 1\.5; a whole number"),
        (sized(3, 4), {"steps": "8"}, "steps is '8'; a whole number"),
        (torch.nn.Linear(2, 2), {}, "is no Description; neuro.describe makes one"),
    ],
)
def test_what_xylo_has_no_counterpart_of_is_refused_with_a_remedy(
    description: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotConvertible, match=message):
        neuro.to_xylo(description, **options)


def test_graded_inputs_of_up_to_fifteen_spikes_and_an_output_reached_by_the_input() -> None:
    """One layer alone: hidden, with read-outs that repeat it."""
    neurons = Neurons("y", (3,), alpha=0.5, beta=0.75, threshold=20.0, reset="subtract")
    description = Description((2,), (neurons,), (Synapses("in", INPUT, "y", [[2.0, 0.3], [0.5, 1.5], [1.0, 1.0]]),), ("y",))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 16, (5, 40, 2), generator=generator) * 0.25
    network = converted(description, x, input_scale=0.25)
    assert [(p.name, p.kind) for p in network.graph.populations] == [
        ("x", "input"), ("y_hidden", "xylo"), ("y", "xylo_out"),
    ]  # fmt: skip
    assert int(network.present(x)["x"].max()) == 15
    spikes, floats = network.run(x)[0]["y"], run_float(description, x).spikes["y"]
    assert float(floats.mean()) > 0.03
    assert float((spikes == floats).double().mean()) > 0.97
