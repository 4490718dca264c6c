"""Static power by cores in use, against a network that is not among its sources."""

import pytest

from experiments.benches.account import static_cores_entry
from hardware.energy.measured_networks import load_networks
from hardware.energy.static_power import static_of_cores


def test_one_core_by_hand():
    assert static_of_cores(1).to("mW") == pytest.approx((0.816, 89.1 / 108, 89.1 / 54))
    assert static_of_cores(108).to("mW")[1] == pytest.approx(89.1)


def test_the_network_that_is_no_source_lies_inside():
    network = load_networks()["lsnn_smnist"]
    found = static_cores_entry(network)
    assert found is not None
    entry, text = found
    low, mid, high = static_of_cores(1).to("mW")
    assert low <= 1.155 <= high
    assert entry == {"status": "compared", "relative_error": round(mid / 1.155 - 1, 4), "inside_interval": True}
    assert "cores in use: 1" in text


def test_its_source_is_not_compared_and_unknown_cores_are_not_guessed():
    networks = load_networks()
    found = static_cores_entry(networks["braille_recurrent"])
    assert found is not None
    assert found[0]["status"] == "calibration"
    assert static_cores_entry(networks["relnet_babi"]) is None


@pytest.mark.parametrize("cores", [0, -1, 129, 1.5, True])
def test_other_numbers_of_cores_are_refused(cores):
    with pytest.raises(ValueError, match="1 to 128"):
        static_of_cores(cores)
