"""Networks that others trained and published: how many winners their integers keep, with one and two synapses a weight."""

from __future__ import annotations

import pytest
import torch

from neuro.conversion.spiking.convert import convert_spiking
from neuro.conversion.spiking.description import Description, run_float
from neuro.exchange.nir.describing import describe
from neuro.exchange.nir.loading import load_nir
from neuro.simulators.support import refusals
from tests.published import published

nir = pytest.importorskip("nir", reason="nir is not installed")

DT_S, STEPS = 1e-4, 256  # of the files


def network(name: str, reset: str) -> Description:
    return describe(load_nir(published(f"nir_paper/{name}.nir")), DT_S, reset=reset).description


@pytest.mark.parametrize(
    ("name", "reset", "lava"),
    [("braille_noDelay_noBias_subtract", "subtract", False), ("braille_noDelay_bias_zero", "zero", True)],
)
def test_recurrent_networks_keep_their_winners_with_two_synapses_a_weight(name, reset, lava):
    """Braille networks of the NIR paper, 300 made-up samples: 89 % of the winners with one, 98 and 99 % with two."""
    description = network(name, reset)
    generator = torch.Generator().manual_seed(7)
    seen, fresh = ((torch.rand(count, STEPS, 12, generator=generator) < 0.1).double() for count in (30, 300))
    expected = run_float(description, fresh).spikes["lif2"]
    winners = expected.sum(dim=1).argmax(dim=1)
    share = {}
    for pieces in (1, 2):
        made = convert_spiking(description, steps=STEPS, calibration=seen, pieces=pieces)
        values, activity = made.run(fresh)
        share[pieces] = float((values["lif2"].sum(dim=1).argmax(dim=1) == winners).double().mean())
        assert (refusals(made.graph, "lava", "lava") == ()) == lava
        assert all(count.wraps_u == count.wide_a == 0 for count in activity.populations.values())
        assert made.cores() <= 3
    assert share[1] > 0.8
    assert share[2] >= 0.97
    auto = convert_spiking(description, steps=STEPS, calibration=seen, pieces="auto")
    assert "two synapses per weight" in auto.table()


def test_an_if_network_of_many_steps_keeps_eight_bits():
    """cnn_sinabs over 300 steps: a bound over all inputs left 4 to 5 levels; now 126 and more, and no clip."""
    description = network("cnn_sinabs", "zero")
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(2, 300, 2 * 34 * 34, generator=generator) < 0.02).double()
    made = convert_spiking(description, steps=300, calibration=x)
    assert [p.kind for p in made.graph.projections] == ["conv", "conv", "conv", "dense", "dense"]
    assert all(max(layer.levels.values()) >= 126 for layer in made.layers)
    assert made.check.clips == made.check.wraps == 0
    assert made.check.class_agreement == 1
    assert min(made.check.spike_agreement.values()) > 0.93
