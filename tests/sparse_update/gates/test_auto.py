"""The auto gate: decisions on made-up values whose answer is known, values against autograd, and exact resume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update.data.stream import Batch
from sparse_update.gates.auto import OBSERVE, AutoConfig, AutoGate, Controller, observed_layers, values
from sparse_update.gates.gate import GateConfig, GateContext
from sparse_update.nested import pack, unpack
from sparse_update.signals.gradients import tapped
from sparse_update.step.plan import Chosen, SparseStep, View
from sparse_update.transformer import ModelConfig, Transformer, token_loss

V, T, B = 32, 16, 8


def feed(controller, mean_of_stratum, steps, seed=0, noise=0.13, windows=32, price=0.015):
    """Observed steps whose windows are worth `mean_of_stratum` plus noise of the size that real runs show."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.as_tensor(mean_of_stratum)
    for step in range(steps):
        stratum = torch.randperm(windows, generator=generator) * controller.cfg.strata // windows
        value = means[stratum] + noise * torch.randn(windows, generator=generator)
        controller.add(stratum, value, step / steps, price)
        if controller.state == "rest":
            break
    return controller


def looking(allowed=30, **changes):
    controller = Controller(AutoConfig(**changes))
    controller.phase, controller.allowed = 1, allowed
    return controller


def test_useless_ranks_above_are_dropped():
    controller = feed(looking(), [0.2] * 12 + [0.0] * 4, 30)
    assert controller.state == "on"
    assert controller.band.first == 0
    assert 11 <= controller.band.stop <= 13
    (decision,) = [d for d in controller.decisions if d["why"].startswith("the gain is significant")]
    assert decision["net_gain"] == pytest.approx(4 / 3 / (1 + 0.015 / 0.75), rel=0.15)
    assert decision["band"]["gain"] - 3 * decision["band"]["error"] > 1


def test_useless_ranks_below_and_on_both_sides_are_dropped():
    low = feed(looking(), [0.0] * 8 + [0.2] * 8, 30)
    assert low.state == "on"
    assert (low.band.first, low.band.stop) in ((7, 16), (8, 16), (9, 16))
    both = feed(looking(allowed=60, remember=64, observe_every=1), [0.0] * 4 + [0.3] * 8 + [-0.1] * 4, 60)
    assert both.state == "on"
    assert abs(both.band.first - 4) <= 1
    assert abs(both.band.stop - 12) <= 1


def test_equal_ranks_switch_nothing_on():
    switched = sum(feed(looking(), [0.2] * 16, 30, seed=seed).state == "on" for seed in range(60))
    assert switched <= 2  # of 60 runs of 23 tests each


def test_small_gains_do_not_repay_dear_scoring():
    means = [0.2] * 8 + [0.1] * 8
    assert feed(looking(), means, 30, noise=0.02).state == "on"
    assert feed(looking(), means, 30, noise=0.02, price=0.5).state == "rest"


def test_it_switches_off_again_when_values_change():
    controller = feed(looking(remember=16), [0.2] * 12 + [0.0] * 4, 24)
    assert controller.state == "on"
    feed(controller, [0.1] * 12 + [0.3] * 4, 60, seed=1)
    last = controller.decisions[-1]
    assert controller.state == "rest" or (controller.band.first, controller.band.stop) != (0, 12)
    assert last["why"] in ("keeping a band no longer pays", "another band pays more")


def test_values_that_are_not_finite_do_not_count_and_few_decide_nothing():
    controller = looking(allowed=6)
    for _ in range(6):
        controller.add(torch.arange(16), torch.full((16,), float("nan")), 0.1, 0.015)
    assert controller.sums.abs().sum() == 0
    assert controller.state == "rest"
    assert controller.decisions[-1]["why"] == "too few steps observed so far"


def test_phases_and_quotas_bound_what_is_observed_while_off():
    controller, observed, step = Controller(AutoConfig()), 0, 0
    total = 600
    for step in range(total):
        controller.advance(step / total, step)
        if controller.observes(step):
            observed += 1
            stratum = torch.arange(32) // 2
            controller.add(
                stratum, 0.2 + 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(step)), step / total, 0.015
            )
    assert 0.025 * total <= observed <= 0.03 * total + 1
    assert controller.state == "rest"
    assert [d["decision"] for d in controller.decisions] == ["off"] * 3


def test_a_run_too_short_to_observe_stays_off():
    controller = Controller(AutoConfig())
    for step in range(20):
        controller.advance(step / 20, step)
        assert not controller.observes(step)
    assert controller.state == "rest"
    assert "too short" in controller.decisions[0]["why"]


def test_values_are_cosines_of_autograd_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    x, y, weight = torch.randn(6, 3, 5), torch.randint(0, 4, (6, 3)), torch.tensor([1, 1, 0.5, 1, 0.0, 1])
    with tapped(observed_layers(model)) as found:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    single = []
    for i in range(6):
        model.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        single.append(torch.cat([layer.weight.grad.flatten() for layer in observed_layers(model).values()]))
    expected = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        cosine = torch.stack([F.cosine_similarity(single[i], single[j], dim=0) for j in others])
        expected.append((cosine * weight[others]).sum() / weight[others].sum())
    torch.testing.assert_close(values(found, weight), torch.stack(expected), rtol=1e-4, atol=1e-5)


class Stream:
    """Text that follows a rule, with two slips in every window; a share of the windows is random tokens."""

    source_names = ("text", "noise")

    def __init__(self, noise):
        self.noise, self.position = noise, 0

    def take(self, n):
        generator = torch.Generator().manual_seed(self.position)
        self.position += n
        start = torch.randint(0, V, (n, 1), generator=generator)
        tokens = (start + torch.arange(T + 1) * 3) % V
        slips = torch.rand(n, T + 1, generator=generator).argsort(1)[:, :2]  # as many in every window: they are all alike
        tokens.scatter_(1, slips, torch.randint(0, V, (n, 2), generator=generator))
        bad = torch.rand(n, generator=generator) < self.noise
        tokens[bad] = torch.randint(0, V, (int(bad.sum()), T + 1), generator=generator)
        return Batch(tokens, bad.to(torch.int8), torch.arange(self.position - n, self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = int(state["position"])


class Run:
    """A training loop in miniature: the gate's calls in the trainer's order, on a clock of steps."""

    def __init__(self, noise, total, **auto):
        torch.manual_seed(0)
        shape = ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V, attention="explicit")
        self.model, self.total, self.trace = Transformer(shape), total, []
        cfg = GateConfig(name="auto", unit="auto", pool_windows=32, signal_options={"bits": 14, "capacity": 256})
        cfg = GateConfig(**{**vars(cfg), "signal": "fresh"})
        context = GateContext(V, T, 0, model=self.model)
        self.gate = AutoGate(
            cfg, Stream(noise), context, AutoConfig(strata=8, observe_every=2, quotas=(0.2, 0.25, 0.3), **auto)
        )
        self.step = 0

    def go(self, steps):
        for _ in range(steps):
            progress = self.step / self.total
            batch = self.gate.next(B, progress)
            x, y = batch.tokens[:, :-1], batch.tokens[:, 1:]
            with self.gate.tap(self.model):
                loss_BT = token_loss(self.model(x), y)
                loss_BT.mean().backward()
            with torch.no_grad():
                for p in self.model.parameters():
                    p -= 0.05 * p.grad / p.grad.norm().clamp(min=1e-6)
                    p.grad = None
            loss_BT = loss_BT.detach()
            self.gate.observe(batch, SparseStep(loss_BT, {}, Chosen(), View(loss_BT)), progress, 1.0)
            self.step += 1
            self.trace.append((batch.tokens.clone(), self.gate.observing, self.gate.controller.state))
        return self


def test_noise_is_found_and_dropped_in_a_real_run():
    run = Run(0.2, 240, apart=0.125).go(240)  # of eight strata: noise fills two, and further apart little is left
    assert run.gate.controller.state == "on", run.gate.decisions
    assert run.gate.controller.band.first == 0
    kept = run.gate.kept_share()
    assert kept["noise"] < 0.75 * kept["text"]
    assert run.gate.notes()["auto/on"] == 1.0
    assert run.gate.uses[OBSERVE] == run.gate.controller.observed
    observed = [observing for _, observing, state in run.trace if state == "on"]
    assert 0 < sum(observed) < len(observed) / 2  # the probe stream goes on while it gates


def test_a_clean_run_passes_every_window_on_in_order_and_mostly_rests():
    run = Run(0.0, 120).go(120)
    assert all(state != "on" for *_, state in run.trace), run.gate.decisions
    stream = Stream(0.0)
    plain, taken = [], 0
    # pools of 32 while it looks, batches while it rests: draws depend on where they start, so follow the gate's own
    seen = torch.cat([tokens for tokens, *_ in run.trace])
    while taken < len(seen):
        size = next(n for n in (32, B) if torch.equal(_at(stream, taken, n)[:B], seen[taken : taken + B]) or n == B)
        plain.append(_at(stream, taken, size))
        taken += size
    assert torch.equal(torch.cat(plain)[: len(seen)], seen)
    assert run.gate.windows_scored < run.gate.windows_offered


def _at(stream, position, n):
    stream.position = position
    return stream.take(n).tokens


@pytest.mark.parametrize("cut", [5, 19, 60, 95])
def test_resumes_bit_for_bit_in_every_state(cut):
    whole = Run(0.4, 120).go(cut)
    tensors, outline = pack(whole.gate.state_dict())
    saved = unpack(outline, {k: v.clone() for k, v in tensors.items()})
    weights = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.go(20)
    other = Run(0.4, 120)
    other.step = cut
    other.model.load_state_dict(weights)
    other.gate.load_state_dict(saved)
    other.go(20)
    for (a, *rest), (b, *others) in zip(whole.trace[cut:], other.trace, strict=True):
        assert torch.equal(a, b)
        assert rest == others
    assert whole.gate.decisions == other.gate.decisions
    assert whole.gate.uses == other.gate.uses


def test_components_are_timed_and_a_signal_after_the_forward_is_refused():
    run = Run(0.0, 10)
    for key, (uses, make) in run.gate.components().items():
        make()()
        assert uses >= 1
        assert key in ("signal[fresh]", OBSERVE)
    with pytest.raises(ValueError, match="before the forward"):
        AutoGate(GateConfig(name="auto", unit="auto", signal="token_loss"), Stream(0.0), GateContext(V, T, 0))


def test_a_step_that_could_not_be_tapped_is_not_counted():
    run = Run(0.4, 120).go(10)
    before = run.gate.controller.observed
    for _ in range(4):
        batch = run.gate.next(B, 0.1)
        loss = torch.ones(B, T)
        run.gate.observe(batch, SparseStep(loss, {}, Chosen(), View(loss)), 0.1, 1.0)
    assert run.gate.controller.observed == before
    assert run.gate.uses[OBSERVE] == before
