"""The digits classifier: the data and its split, a small network through every simulator, the whole command once."""

from __future__ import annotations

import pytest
import torch

from experiments.studies import digits
from neuro.conversion.lif import LifNetwork
from neuro.graph import load_graph
from neuro.modules.spiking import SpikingClassifier, current_code, predicted
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava import client as lava_client
from tests.experiments.console import document as printed

STEPS = 6


@pytest.fixture(scope="module")
def data():
    return digits.load()


@pytest.fixture(scope="module")
def small(data) -> tuple[SpikingClassifier, LifNetwork]:
    """A small network, trained a little."""
    torch.set_num_threads(1)
    images, classes, _, _ = data
    model = digits.train(images[:600], classes[:600], lambda x: current_code(x, STEPS), hidden=24, epochs=6, seed=0)
    return model, digits.integers(model, "current", STEPS)


def test_the_split_is_by_class_fixed_and_whole(data):
    images, classes, test_images, test_classes = data
    assert (images.shape, test_images.shape) == ((1347, 64), (450, 64))
    share = torch.bincount(test_classes) / torch.bincount(torch.cat([classes, test_classes]))
    assert share.min() > 0.24
    assert share.max() < 0.26
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images * 16, (images * 16).round())
    assert torch.equal(digits.load()[2], test_images)
    assert not torch.equal(digits.load(seed=1)[2], test_images)
    together = {tuple(row) for row in images.tolist()}
    assert not any(tuple(row) in together for row in test_images.tolist())


def test_training_is_repeatable_and_learns(data, small):
    images, classes, test_images, test_classes = data
    model, _ = small
    again = digits.train(images[:600], classes[:600], lambda x: current_code(x, STEPS), hidden=24, epochs=6, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    right = predicted(model(current_code(test_images, STEPS))) == test_classes
    assert right.double().mean() > 0.6


def test_integers_agree_with_the_float_network_on_every_simulator(data, small):
    _, _, images, classes = data
    model, network = small
    x = current_code(images[:200], STEPS)
    accuracy = float((predicted(model(x)) == classes[:200]).double().mean())
    found = digits.evaluate(network, x, classes[:200])
    for key in ("lava", "chip", "snntorch"):
        assert abs(found[key] - accuracy) <= 0.03, key
    activity = simulate(network.graph, network.present(x))
    assert found["synops_per_image"] == sum(c.synops for c in activity.projections.values()) / 200
    assert found["lava"] == float((predicted(network.collect(activity.spikes["layer2"])) == classes[:200]).double().mean())


@pytest.mark.lava
@pytest.mark.usefixtures("lava")
def test_lava_has_the_same_states(data, small):
    _, network = small
    found = digits.against_lava(network, current_code(data[2][:5], STEPS), timeout_s=60)
    assert found["equal"], found["text"]
    assert found["values"] == (5 * STEPS + 2) * (64 + 4 * (24 + 10))


def quick(monkeypatch, small, float_accuracy=None):
    monkeypatch.setattr(digits, "train", lambda *_, **__: small[0])
    if float_accuracy is not None:
        monkeypatch.setattr(digits, "BAR", float_accuracy)


def test_the_command_says_whether_it_holds(monkeypatch, capsys, small, tmp_path):
    words = ["--steps", str(STEPS), "--lava-samples", "0", "--graph", str(tmp_path / "digits.graph.npz")]
    quick(monkeypatch, small, float_accuracy=0.3)
    monkeypatch.setattr(digits, "WITHIN", 0.03)
    assert digits.main(words) == 0
    document = printed(capsys.readouterr().out)
    assert document["holds"]
    assert set(document["accuracy"]) == {"float", "lava", "chip", "snntorch"}
    assert document["lava"] == {"ran": False, "reason": "not asked for"}
    assert load_graph(tmp_path / "digits.graph.npz").meta["steps"] == STEPS
    monkeypatch.setattr(digits, "BAR", 0.999)
    assert digits.main(words) == 1
    assert not printed(capsys.readouterr().out)["holds"]


def test_without_lava_it_says_so_and_with_a_failure_it_fails(monkeypatch, capsys, small):
    quick(monkeypatch, small, float_accuracy=0.3)
    monkeypatch.setattr(digits, "WITHIN", 0.03)
    for error, code in ((lava_client.LavaUnavailable("no Lava here"), 0), (lava_client.LavaTimeout("too long"), 1)):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(lava_client, "run", fail)
        assert digits.main(["--steps", str(STEPS), "--lava-samples", "1"]) == code
        document = printed(capsys.readouterr().out)
        assert document["lava"] == {"ran": False, "reason": str(error)}


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    assert digits.main([]) == 2
    assert "pip install 'spikegate[spiking]'" in capsys.readouterr().err


def test_settings_out_of_range(capsys):
    with pytest.raises(SystemExit):
        digits.main(["--epochs", "0"])
    assert "--epochs is 0; the lowest is 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("code", ["current", "rate"])
def test_the_whole_command_holds(code, capsys):
    """Float at least 0.95, every simulator within a point of it, Lava equal if it is there."""
    torch.set_num_threads(1)
    assert digits.main(["--code", code, "--lava-samples", "4"]) == 0
    document = printed(capsys.readouterr().out)
    assert document["accuracy"]["float"] >= 0.95
    assert all(abs(value - document["accuracy"]["float"]) <= 0.01 + 1e-9 for value in document["accuracy"].values())
    assert document["lava"].get("equal", True)
