"""The auto gate: decisions on made-up values whose answer is known, values against autograd, and exact resume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_update.data.records import Batch
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig, Band, Controller, kept_by
from sparse_update.gates.deciding.auto import OBSERVE, AutoGate, agreement, observed_layers
from sparse_update.gates.gate import GateContext
from sparse_update.nested import pack, unpack
from sparse_update.signals.gradients import tapped
from sparse_update.step.plan import Chosen, SparseStep, View
from sparse_update.transformer import ModelConfig, Transformer, token_loss

V, T, B = 32, 16, 8


def feed(controller, along, steps, seed=0, noise=0.13, windows=32, price=0.015):
    """Observed steps whose windows' gradients have the parts `along` (per stratum) in a common direction, plus noise of the
    size that real runs show: two windows agree by the product of theirs."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.as_tensor(along)
    for step in range(steps):
        stratum = torch.randperm(windows, generator=generator) * controller.cfg.strata // windows
        shaken = torch.randn(windows, windows, generator=generator) * noise
        agreement = along[stratum][:, None] * along[stratum] + (shaken + shaken.T) / 2**0.5
        controller.add(stratum, agreement.fill_diagonal_(1), step / steps, price)
        if controller.state == "rest":
            break
    return controller


def looking(allowed=30, **changes):
    controller = Controller(AutoConfig(**changes))
    controller.phase, controller.allowed = 1, allowed
    return controller


def test_useless_ranks_above_are_dropped():
    controller = feed(looking(), [0.45] * 12 + [0.0] * 4, 30)
    assert controller.state == "on"
    assert (controller.band.first, controller.band.stop) == (0, 12)
    decision = controller.decisions[0]
    assert decision["observed"] == controller.cfg.least  # as soon as anything may be decided
    assert decision["net_gain"] == pytest.approx(4 / 3 / (1 + 0.015 / 0.75), rel=0.1)
    assert decision["band"]["gain"] - 3 * decision["band"]["error"] > 1
    assert decision["value"] == pytest.approx([0.2] * 12 + [0.0] * 4, abs=0.08)


def test_useless_ranks_below_and_on_both_sides_are_dropped():
    low = feed(looking(lower=True), [0.0] * 8 + [0.45] * 8, 30)
    assert low.state == "on"
    assert (low.band.first, low.band.stop) == (8, 16)
    both = feed(looking(lower=True), [0.0] * 3 + [0.5] * 10 + [-0.2] * 3, 60)
    assert (both.band.first, both.band.stop) == (3, 13)


def test_the_least_surprising_ranks_stay_unless_they_are_what_is_known():
    """They may be what all text of the kind is full of."""
    assert feed(looking(), [0.0] * 3 + [0.45] * 13, 60).state == "rest"
    above = feed(looking(), [0.0] * 2 + [0.45] * 10 + [0.0] * 4, 60)
    assert (above.state, above.band.first, above.band.stop) == ("on", 0, 12)


def test_ranks_that_agree_only_among_themselves_are_dropped_though_they_agree_most():
    """Garbage: strata 13 to 15 point all the same way, which is no other's."""
    generator = torch.Generator().manual_seed(0)
    controller = looking()
    for step in range(30):
        stratum = torch.randperm(32, generator=generator) // 2
        garbage = (stratum >= 13).double()
        agreement = 0.2 * (1 - garbage[:, None]) * (1 - garbage) + 0.9 * garbage[:, None] * garbage
        agreement += 0.1 * torch.randn(32, 32, generator=generator, dtype=torch.float64)
        controller.add(stratum, agreement, step / 30, 0.015)
    assert (controller.band.first, controller.band.stop) == (0, 13)


def test_what_was_seen_before_is_dropped_though_it_agrees_as_well_as_the_rest():
    controller, generator = looking(lower=True), torch.Generator().manual_seed(0)
    for step in range(30):
        stratum = torch.randperm(32, generator=generator) // 2
        agreement = 0.2 + 0.1 * torch.randn(32, 32, generator=generator, dtype=torch.float64)
        controller.add(stratum, agreement, step / 30, 0.015, new_B=stratum >= 3)
    assert (controller.band.first, controller.band.stop) == (3, 16)
    assert controller.values(3, 16)[0] == pytest.approx(torch.tensor([0.0] * 3 + [0.2] * 13), abs=0.05)


def test_equal_ranks_switch_nothing_on():
    switched = sum(feed(looking(), [0.45] * 16, 30, seed=seed).state == "on" for seed in range(60))
    assert switched <= 1  # of 60 runs of 15 tests each


def test_ranks_worth_less_but_not_far_less_are_kept():
    fall = torch.linspace(0.55, 0.4, 16)  # the last stratum is worth 0.4 / 0.475 of the mean
    assert not any(feed(looking(), fall, 30, seed=seed).state == "on" for seed in range(20))


def test_a_minority_that_is_worth_something_stays():
    """Ranks at the top worth 0.4 of the rest, then 0.26, which only a low bar lets go."""
    assert feed(looking(), [0.5] * 12 + [0.2] * 4, 30, noise=0.02).state == "rest"
    assert feed(looking(), [0.5] * 12 + [0.13] * 4, 30, noise=0.02).state == "on"
    assert feed(looking(nothing=0.2), [0.5] * 12 + [0.13] * 4, 30, noise=0.02).state == "rest"


def test_a_pool_is_cut_at_the_widest_gap_near_the_end_of_the_band():
    generator = torch.Generator().manual_seed(0)
    text, cfg = torch.rand(200, generator=generator), AutoConfig()
    for garbage in (44, 50, 56):  # of about 250: 12.4 to 13.2 of 16 strata are text
        noise = 3 + torch.rand(garbage, generator=generator)
        order = torch.randperm(200 + garbage, generator=generator)
        score = torch.cat((text, noise))[order]
        assert torch.equal(kept_by(score, Band(0, 13), cfg), score < 2)
    score = torch.cat((text, text[:30] / 1000 - 1))  # repeats, far below
    assert torch.equal(kept_by(score, Band(2, 16), cfg), score > -0.5)
    assert kept_by(score, Band(0, 16), cfg).all()


def test_without_reach_and_with_equal_gaps_a_pool_is_cut_by_rank():
    score = torch.arange(64.0)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(kept_by(score, Band(2, 12), AutoConfig(reach=0)), (score >= 8) & (score < 48))
    # all gaps alike: the fewest windows go
    assert torch.equal(kept_by(score, Band(2, 12), AutoConfig()), (score >= 4) & (score < 52))


def test_the_most_surprising_ranks_stay_where_they_are_what_is_new():
    assert feed(looking(upper=False, lower=True), [0.45] * 12 + [0.0] * 4, 30).state == "rest"
    low = feed(looking(upper=False, lower=True), [0.0] * 5 + [0.45] * 11, 30)
    assert (low.band.first, low.band.stop) == (5, 16)


def test_it_looks_on_while_a_band_is_likely_and_only_up_to_the_last_quota():
    """Two ranks of 16 do nothing: a gain of 1.14 whose error is too large at first."""
    along = [0.2] * 14 + [0.0] * 2
    short = feed(looking(allowed=14), along, 60, noise=0.5)
    assert (short.state, short.looked) == ("rest", 14)
    longer = looking(allowed=14)
    longer.most = 60
    feed(longer, along, 60, noise=0.5)
    assert longer.state == "on"
    assert 14 < longer.decisions[0]["observed"] <= 60
    bounded = looking(allowed=14, sigma=1e9)
    bounded.most = 30
    feed(bounded, along, 60, noise=0.5)
    assert (bounded.state, bounded.looked) == ("rest", 30)
    equal = looking(allowed=14)
    equal.most = 60
    feed(equal, [0.2] * 16, 60, noise=0.5)
    assert (equal.state, equal.looked) == ("rest", 14)  # nothing is likely there


def test_dear_scoring_is_not_repaid():
    along = [0.45] * 13 + [0.1] * 3
    assert feed(looking(), along, 30, noise=0.05).state == "on"
    assert feed(looking(), along, 30, noise=0.05, price=0.5).state == "rest"


def test_it_moves_or_switches_off_when_values_change():
    controller = feed(looking(remember=16), [0.45] * 12 + [0.0] * 4, 24)
    assert (controller.band.first, controller.band.stop) == (0, 12)
    feed(controller, [0.45] * 14 + [0.0] * 2, 60, seed=1)
    assert (controller.band.first, controller.band.stop) == (0, 14)
    assert controller.decisions[-1]["why"].startswith("the worth of strata at its ends")
    feed(controller, [0.3] * 14 + [0.6] * 2, 60, seed=2)
    assert controller.state == "rest" or controller.band.stop == 16


def test_values_that_are_not_finite_do_not_count_and_few_decide_nothing():
    controller = looking(allowed=6)
    for _ in range(6):
        controller.add(torch.arange(16), torch.full((16, 16), float("nan")), 0.1, 0.015)
    assert controller.sums.abs().sum() == 0
    assert controller.state == "rest"
    assert controller.decisions[-1]["why"] == "too few steps observed so far"


def test_the_error_of_a_gain_is_what_repeated_runs_scatter_by():
    gains, errors = [], []
    for seed in range(40):
        controller = feed(looking(allowed=10**6, sigma=1e6), [0.45] * 12 + [0.1] * 4, 24, seed=seed)
        band = controller.compare(0, 12)
        gains.append(band.gain)
        errors.append(band.error)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(gains).std()), rel=0.35)


def test_phases_and_quotas_bound_what_is_observed_while_off():
    controller, observed, total = Controller(AutoConfig()), 0, 1500
    for step in range(total):
        controller.advance(step / total, step)
        if controller.observes(step):
            observed += 1
            noise = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(step))
            controller.add(torch.arange(32) // 2, 0.2 + noise, step / total, 0.015)
    quota = controller.cfg.quotas[-1] * total
    assert 0.9 * quota <= observed <= quota + 1
    assert controller.state == "rest"
    assert [d["decision"] for d in controller.decisions] == ["off"] * len(controller.cfg.phases)


def test_a_run_too_short_to_observe_stays_off():
    controller = Controller(AutoConfig())
    for step in range(20):
        controller.advance(step / 20, step)
        assert not controller.observes(step)
    assert controller.state == "rest"
    assert "too short" in controller.decisions[0]["why"]


def test_agreements_are_cosines_of_autograd_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    x, y = torch.randn(6, 3, 5), torch.randint(0, 4, (6, 3))
    with tapped(observed_layers(model)) as found:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    single = []
    for i in range(6):
        model.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        single.append(torch.cat([layer.weight.grad.flatten() for layer in observed_layers(model).values()]))
    expected = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for a in single]) for b in single])
    torch.testing.assert_close(agreement(found), expected, rtol=1e-4, atol=1e-5)


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

    def __init__(self, noise, total):
        torch.manual_seed(0)
        shape = ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V, attention="explicit")
        self.model, self.total, self.trace = Transformer(shape), total, []
        cfg = GateConfig(name="auto", unit="auto", pool_windows=32, ngram_bits=14)
        context = GateContext(V, T, 0, model=self.model)
        settings = AutoConfig(strata=8, least=8, quotas=(0.2, 0.25, 0.3, 0.35), apart=0.125, probe_share=1 / 16)
        self.gate = AutoGate(cfg, Stream(noise), context, settings)
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
    run = Run(0.2, 240).go(240)
    assert run.gate.controller.state == "on", run.gate.decisions
    assert run.gate.controller.band.first == 0
    kept = run.gate.kept_share()
    assert kept["noise"] < 0.75 * kept["text"]
    assert run.gate.notes()["auto/on"] == 1.0
    assert run.gate.uses[OBSERVE] == B * run.gate.controller.observed
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
    for key, component in run.gate.components().items():
        component.make()()
        assert component.uses >= 1
        assert component.flops > 0
        assert key in ("signal[ngram]", "signal[containment]", OBSERVE)
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
    assert run.gate.uses[OBSERVE] == B * before
