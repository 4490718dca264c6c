"""Training for few events: budget, controller, pruning, 8 bits, distillation, resuming, and the counts of the deployed
model beside those of the gates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import convert
from neuro.conversion.integers import quantise
from neuro.deployment.deployed import deploy
from neuro.modules.thresholds import EventThreshold
from neuro.training.distil import distillation_loss
from neuro.training.insert import GateConfig, Gates, find_gates, insert_thresholds
from neuro.training.loop import FineTuner, TrainSettings, fine_tune
from neuro.training.penalty import Controller, ControllerConfig, EventBudget, annealed
from neuro.training.pruning import Pruner, density_at
from neuro.training.quantise import rounded

WIDTH, CLASSES = 12, 6
NAMES = ("q", "k", "up", "down")


class Net(nn.Module):
    """Two products of one normalised input, then an MLP with a squared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return self.down(F.relu(self.up(x + torch.tanh(self.q(n)) * self.k(n))).square())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture(scope="module")
def batches() -> Callable[[int], tuple[Tensor, Tensor]]:
    """A task of 6 classes: which random prototype an input lies nearest to."""
    prototypes = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))

    def batch(i: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1 + i))
        return x, (x @ prototypes.T).argmax(-1)

    return batch


def gated(net: Net, batches: Any, **given: Any) -> Gates:
    return insert_thresholds(net, NAMES, batches(0)[0], **given)


def tuner(net: Net, batches: Any, gates: Gates | None, **given: Any) -> FineTuner:
    teacher = copy.deepcopy(net) if given.get("distil_weight") else None
    return FineTuner(net, batches, TrainSettings(**given), loss=F.cross_entropy, gates=gates, teacher=teacher)


def accuracy(model: nn.Module, batches: Any) -> float:
    x, y = batches(10_000)
    return float((model(x).argmax(-1) == y).double().mean())


def counted_by_hand(net: nn.Module, gates: Gates, x: Tensor, scale: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Rows x channels of every layer's input that are not 0, after rounding to 8 bits where scales are given."""
    sent: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0] if scale is None else quantise(args[0], scale[name])
            sent[name] = value.reshape(-1, value.shape[-1]) != 0

        return note

    handles = [layer.linear.register_forward_pre_hook(hook(layer.name)) for layer in gates.layers]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return sent


def test_gates_without_threshold_change_nothing(net: Net, batches: Any) -> None:
    x, _ = batches(0)
    before = net(x)
    gates = gated(net, batches, default=GateConfig(learn=False))
    assert torch.equal(net(x), before)
    assert torch.equal(net.train()(x), before)
    assert [layer.name for layer in gates.layers] == [f"{name}.linear" for name in NAMES]
    assert [layer.linear for layer in find_gates(copy.deepcopy(net)).layers] != []
    assert [layer.name for layer in find_gates(net).layers] == [layer.name for layer in gates.layers]


def test_shared_and_special_gates(net: Net, batches: Any) -> None:
    x, _ = batches(0)
    gates = gated(net, batches, share=[["q", "k"]], special={"down": GateConfig(two_sided=False, shared=True)})
    assert len(gates.thresholds) == 3
    assert net.q.gate is net.k.gate  # type: ignore[union-attr]
    assert gates.layers[3].gate.raw.shape == (1,)
    # the size of what flows in is the unit of theta
    normed = net.norm(x)
    assert float(gates.layers[0].gate.scale) == pytest.approx(float(normed.detach().square().mean().sqrt()), rel=1e-5)


def test_relufied_input_is_relu_above_theta(net: Net, batches: Any) -> None:
    gates = gated(net, batches, default=GateConfig(two_sided=False, initial=0.3))
    x = torch.randn(20, WIDTH)
    gate = gates.layers[0].gate
    torch.testing.assert_close(gate(x), torch.where(x > gate.theta_C, F.relu(x), 0.0), rtol=0, atol=0)


def test_budget_is_the_count_of_synaptic_operations(net: Net, batches: Any) -> None:
    x, _ = batches(0)
    gates = gated(net, batches, default=GateConfig(initial=0.5))
    with torch.no_grad():
        net.up.linear.weight[:, :5] = 0  # type: ignore[union-attr]
        net.q.linear.weight[::2] = 0  # type: ignore[union-attr]
    net.train()
    net(x)
    sent = counted_by_hand(net, gates, x)
    dense = sum(layer.linear.weight.numel() for layer in gates.layers)
    for sparse in (True, False):
        synops = sum(
            float(sent[layer.name].double().sum(0) @ ((layer.linear.weight != 0) | (not sparse)).double().sum(0))
            for layer in gates.layers
        )
        share = EventBudget(gates, sparse=sparse, extra_macs=100.0).share()
        assert float(share.detach()) == pytest.approx((synops / 64 + 100) / (dense + 100), rel=1e-5)
    share.backward()
    assert all(float(layer.gate.raw.grad.abs().sum()) > 0 for layer in gates.layers)  # type: ignore[union-attr]


def test_controller_holds_a_plant_at_its_target() -> None:
    """A share that answers to the weight as 1 / (1 + gain x weight), for gains far apart."""
    for gain in (0.3, 1.0, 30.0):
        control, share = Controller(), 1.0
        for step in range(1500):
            share = 1 / (1 + gain * control.update(share, annealed(step / 1500, 1.0, 0.2, 0.5)))
        assert share == pytest.approx(0.2, rel=0.02)


def test_training_reaches_the_target_and_keeps_the_task(net: Net, batches: Any) -> None:
    plain = copy.deepcopy(net)
    fine_tune(plain, batches, TrainSettings(steps=150, lr=1e-2), loss=F.cross_entropy)
    gates = gated(net, batches, default=GateConfig(initial=0.3, theta_gradient="both"))
    quick = ControllerConfig(integral=0.3)
    settings = TrainSettings(steps=200, lr=1e-2, target_share=0.3, threshold_lr=0.1, controller=quick)
    found = fine_tune(net, batches, settings, loss=F.cross_entropy, gates=gates)
    assert found.share == pytest.approx(0.3, abs=0.03)
    assert found.history[0].share > 0.6
    assert not net.training
    assert accuracy(plain, batches) > 0.8
    assert accuracy(net, batches) > accuracy(plain, batches) - 0.25


@pytest.mark.parametrize("score", ["magnitude", "value"])
def test_pruning_holds_its_masks(net: Net, batches: Any, score: str) -> None:
    gates = gated(net, batches)
    run = tuner(net, batches, gates, steps=60, weight_density=0.3, prune_score=score, prune_every=5, lr=1e-2)
    found = run.run()
    weights = torch.cat([layer.linear.weight.flatten() for layer in gates.layers])
    assert float((weights != 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert min(found.densities.values()) > 0.04
    densities = [moment.density for moment in found.history]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1.0


def test_value_score_is_loss_per_operation(net: Net, batches: Any) -> None:
    """Equal weights and gradients: the synapses of a channel that sends more often go first."""
    layer = nn.Linear(4, 3, bias=False)
    gates = insert_thresholds(nn.Sequential(layer), ["0"], torch.ones(8, 4))
    with torch.no_grad():
        layer.weight.fill_(0.5)
    pruner = Pruner(gates.linears, "value", gates, lowest=0.0)
    gates.layers[0].gate.rate_C = torch.tensor([0.9, 0.1, 0.5, 0.3])
    layer.weight.grad = torch.ones_like(layer.weight)
    pruner.observe()
    pruner.prune_to(0.5)
    assert (layer.weight != 0).all(0).tolist() == [False, True, False, True]


def test_cubic_schedule() -> None:
    assert density_at(0.05, 0.1, 0.6, 0.3) == 1.0
    assert density_at(0.35, 0.1, 0.6, 0.3) == pytest.approx(0.3 + 0.7 / 8)
    assert density_at(0.9, 0.1, 0.6, 0.3) == pytest.approx(0.3)


def test_distillation_is_torchs_kl() -> None:
    student, teacher = torch.randn(3, 4, 7, requires_grad=True), torch.randn(3, 4, 7)
    p, q = F.softmax(student / 2, -1), F.softmax(teacher / 2, -1)
    expected = 4 * F.kl_div(p.log().flatten(0, 1), q.flatten(0, 1), reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_teacher_pulls_the_student(net: Net, batches: Any) -> None:
    teacher = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x, _ = batches(0)
    before = float(distillation_loss(net(x), teacher(x)).detach())
    settings = TrainSettings(steps=40, lr=5e-3, distil_weight=1.0)
    fine_tune(net, batches, settings, loss=F.cross_entropy, teacher=teacher)
    assert float(distillation_loss(net(x), teacher(x)).detach()) < 0.5 * before


def test_rounding_equals_the_converters() -> None:
    x = 3 * torch.randn(200, requires_grad=True)
    y = rounded(x, 0.017)
    torch.testing.assert_close(y, quantise(x.detach(), 0.017) * 0.017)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, (x.detach().abs() <= 127 * 0.017).float())


SETTINGS = {
    "steps": 30,
    "target_share": 0.3,
    "weight_density": 0.5,
    "prune_every": 3,
    "distil_weight": 0.3,
    "quantise_last": 0.4,
    "lr": 5e-3,
}


@pytest.mark.parametrize("stop", [7, 18, 25])
def test_resuming_is_bit_exact(batches: Any, stop: int) -> None:
    """Stopped while pruning, at the start of the 8-bit stage and inside it."""

    def fresh() -> tuple[Net, FineTuner]:
        torch.manual_seed(3)
        net = Net()
        return net, tuner(net, batches, gated(net, batches), **SETTINGS)

    straight, first = fresh()
    first.run()
    _, broken = fresh()
    broken.run(until=stop)
    state = broken.state_dict()
    resumed, last = fresh()
    last.load_state_dict(state)
    report = last.run()
    assert report.history == tuple(first.history)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_deployed_model_counts_the_events_that_the_gates_pass(net: Net, batches: Any) -> None:
    x, _ = batches(77)
    gates = gated(net, batches, special={"down": GateConfig(two_sided=False, shared=True)})
    settings = TrainSettings(steps=60, target_share=0.25, weight_density=0.5, lr=5e-3, threshold_lr=0.05)
    fine_tune(net, batches, settings, loss=F.cross_entropy, gates=gates)
    found = calibrate(net, [x])
    plan = convert(net, found, analyse(net, x))
    assert set(plan.modules) == {f"{name}.linear" for name in NAMES}
    model = deploy(net, plan)
    model(x)
    counts = {c.layer: c for c in model.counts() if not c.host}
    scales = {name: s.input_scale for s in plan.segments for name in s.modules[:1]}
    alone = [s.modules[0] for s in plan.segments if len(s.modules) == 1]
    assert len(alone) >= 2
    lines = {s.modules[0]: len(s.constant_lines) for s in plan.segments}
    gates_in_model = find_gates(net)
    scales = {layer.name: scales.get(layer.name, 1.0) for layer in gates_in_model.layers}
    sent = counted_by_hand(net, gates_in_model, x, scales)
    for name in ("q.linear", "k.linear"):  # their inputs come from the host in float, so they are the same in both models
        events = int(sent[name].sum())
        assert counts[name].events == events + len(x) * lines[name]
        passed = int((net.get_submodule(name.replace("linear", "gate"))(net.norm(x)) != 0).sum())
        assert passed >= events > 0.9 * passed  # only what rounds to 0 is missing
    assert model(x).isfinite().all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda n, b: insert_thresholds(n, ["nothing"], b(0)[0]), "no module 'nothing'"),
        (lambda n, b: insert_thresholds(n, ["norm"], b(0)[0]), "'norm' is LayerNorm"),
        (lambda n, b: insert_thresholds(n, ["q", "down"], b(0)[0], share=[["q", "down"]]), "different widths"),
        (lambda n, b: insert_thresholds(n, ["q"], b(0)[0], special={"k": GateConfig()}), "'k' is not among"),
        (lambda n, b: insert_thresholds(n, ["q"], torch.zeros(3, WIDTH)), "no input other than 0|LayerNorm"),
        (lambda n, b: tuner(n, b, None, target_share=0.2), "needs gates"),
        (lambda n, b: FineTuner(n, b, TrainSettings(distil_weight=0.5), loss=F.cross_entropy), "there is no teacher"),
        (lambda n, b: TrainSettings(weight_density=0.0), "weight_density is 0"),
        (lambda n, b: TrainSettings(quantise_last=2.0), "quantise_last is 2"),
        (lambda n, b: TrainSettings(steps=0), "steps 0"),
        (lambda n, b: Controller().update(0.3, 0.0), "target 0"),
        (lambda n, b: EventBudget(Gates()), "at least one gated layer"),
        (lambda n, b: Pruner({}, "best"), "one of magnitude, value"),
        (lambda n, b: Pruner({}, "value"), "needs gates"),
        (lambda n, b: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "they must agree"),
    ],
)
def test_bad_settings_are_named(net: Net, batches: Any, act: Any, message: str) -> None:
    if message.startswith("no input"):
        net.norm.bias.data.zero_()
    with pytest.raises(ValueError, match=message):
        act(net, batches)


def test_a_diverging_run_says_so(net: Net, batches: Any) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * float("nan")

    with pytest.raises(FloatingPointError, match="lower lr"):
        fine_tune(net, batches, TrainSettings(steps=2), loss=loss)


def test_budget_asks_for_a_training_pass(net: Net, batches: Any) -> None:
    gates = gated(net, batches)
    with pytest.raises(RuntimeError, match="training mode"):
        EventBudget(gates).share()
    assert isinstance(gates.thresholds[0], EventThreshold)
