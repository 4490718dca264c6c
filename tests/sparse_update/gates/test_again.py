"""What training again is worth: verdicts on made-up trials, exact going back, a run that meets repeats, exact resume."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.clock.component import SCORING_FORWARD
from sparse_update.data.records import Batch
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig
from sparse_update.gates.deciding.again import Again, AgainConfig
from sparse_update.gates.deciding.auto import AutoGate
from sparse_update.gates.gate import GateContext
from sparse_update.nested import pack, unpack
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, Chosen, SparseStep, View
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Subset, SubsetConfig
from sparse_update.weights.undo import Undo

V, T, B = 32, 48, 8


def seen(again, share, windows=4096):
    marks = torch.arange(windows) % 100 < 100 * share
    for part in marks.split(64):
        again.watch(part)
    return again


def trial(again, progress, new, old, spread=0.02, seed=0, judges=128):
    """A trial in which the loss falls by `new` and `old` on the mean over the windows that judge, exactly."""
    generator = torch.Generator().manual_seed(seed)

    def after(fall):
        noise = torch.randn(judges, generator=generator, dtype=torch.float64) * spread
        return before - fall + noise - noise.mean()

    before = 2 + torch.rand(judges, generator=generator, dtype=torch.float64)
    again.add(progress, before, after(old), after(new))
    return again


def test_the_share_that_was_seen_is_a_mean_over_the_latest_windows():
    again = Again(AgainConfig(remember=100))
    again.watch(torch.tensor([True, False]))
    assert again.share == 0.5
    again.watch(torch.tensor([True] * 2))
    assert again.share == pytest.approx(3 / 4)
    for _ in range(50):
        again.watch(torch.arange(10) < 3)
    assert again.share == pytest.approx(0.3, abs=0.01)


def test_repeats_that_do_little_are_dropped_with_their_worth_and_error():
    again = trial(seen(Again(AgainConfig()), 0.4), 0.1, 0.06, 0.015, spread=0.05)
    assert again.verdict == "drop"
    assert again.dropping
    found = again.decisions[-1]
    assert found["worth"] == pytest.approx(0.25)
    assert found["better"] == pytest.approx(0.045)
    # standard error of a mean of 128 differences of two noises, times the factor for another draw of a branch
    assert found["error"] == pytest.approx(AgainConfig().noise * 0.05 * 2**0.5 / 128**0.5, rel=0.2)


@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_repeats_that_are_worth_twice_as_much_are_kept_whatever_the_chance(spread):
    for seed in range(40):
        again = seen(Again(AgainConfig()), 0.4)
        for at in AgainConfig().phases:
            if again.due(at):
                trial(again, at, 0.03, 0.06, spread=spread, seed=seed)
        assert again.verdict == "keep"
        assert len(again.trials) == (1 if spread == 0.05 else 2)  # sure at once, or never


def test_a_difference_within_its_error_is_not_believed_where_trials_are_blunt_and_several_add_up():
    again = seen(Again(AgainConfig(phases=(0.07, 0.08, 0.13))), 0.4)
    trial(again, 0.07, 0.03, 0.019, spread=0.05)  # 0.011, and an error of 0.0125: more than a third of 0.03
    assert again.verdict == "open"
    trial(again, 0.08, 0.03, 0.011, spread=0.05, seed=1)  # 0.015 in the mean, and an error of 0.0088
    assert again.verdict == "drop"


@pytest.mark.parametrize(("old", "verdict"), [(0.046, "drop"), (0.06, "drop"), (0.066, "open"), (0.08, "keep")])
def test_sharp_trials_keep_only_what_is_better_and_leave_a_doubt_to_another(old, verdict):
    again = trial(seen(Again(AgainConfig()), 0.4), 0.1, 0.05, old, spread=0.05)
    assert 0.01 < again.decisions[-1]["error"] < 0.05 * AgainConfig().sharp
    assert again.verdict == verdict


def test_after_the_last_trial_a_doubt_keeps():
    again = seen(Again(AgainConfig()), 0.4)
    assert AgainConfig().phases[-1] <= 0.2
    for seed, at in enumerate((0.12, 0.2)):  # began late: the first takes no place of the second
        assert again.due(at)
        assert again.verdict == "open"
        trial(again, at, 0.05, 0.066 - 0.006 * seed, spread=0.05, seed=seed)
    assert again.decisions[-1]["better"] < -again.decisions[-1]["error"]
    assert again.verdict == "keep"
    assert not again.due(0.3)


def test_a_stream_without_repeats_or_with_nothing_else_is_left_alone():
    cfg = AgainConfig()
    assert not seen(Again(cfg), 0.03).due(0.2)
    assert not seen(Again(cfg), 0.95).due(0.2)
    assert seen(Again(cfg), 0.5).due(0.2)
    assert not seen(Again(cfg), 0.5).due(0.9)
    epoch = trial(seen(Again(cfg), 0.4), 0.1, 0.06, 0.0)
    assert epoch.dropping
    assert not seen(epoch, 1.0).dropping  # another epoch: nothing is new


def test_branches_are_a_share_of_the_run_and_a_short_run_has_none():
    again = Again(AgainConfig())
    assert again.steps(0.1, 90) == 18
    assert again.steps(0.1, 9000) == AgainConfig().most_steps
    assert again.steps(0.1, 25) == 0
    assert again.steps(0.0, 0) == 0


def test_losses_that_are_not_finite_are_no_trial():
    again = seen(Again(AgainConfig()), 0.4)
    again.add(0.1, torch.ones(8), torch.full((8,), float("nan")), torch.ones(8))
    assert not again.trials
    assert again.verdict == "open"
    assert not again.due(0.1)  # the next phase


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 0.1), st.floats(-0.05, 0.2), st.floats(0.01, 0.5), st.integers(0, 3))
def test_dropping_in_error_and_keeping_in_error_are_weighed_by_how_sharp_a_trial_is(new, old, spread, seed):
    cfg = AgainConfig()
    again = trial(seen(Again(cfg), 0.4), 0.1, new, old, spread=spread, seed=seed)
    error = again.decisions[-1]["error"]
    standard = (new - old) / error
    if error <= new / 3:
        assert (again.verdict == "drop") == (standard > -1)
    else:
        assert (again.verdict == "drop") == (standard > 1.5)
    assert (again.verdict == "keep") == (standard < -1.5)


def test_going_back_is_exact_and_training_goes_on_as_if_nothing_had_been():
    def made():
        torch.manual_seed(0)
        model = Transformer(ModelConfig(width=16, layers=1, heads=2, context=T, vocab_size=V, attention="explicit"))
        return model, Optimizer(model, Subset(model, SubsetConfig(), 0).active, OptimConfig(name="muon"))

    def train(model, optimizer, seeds):
        for seed in seeds:
            tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
            token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
            optimizer.step(0.3)

    for before in (0, 2):  # without moments, and with
        (model, optimizer), (other, plain) = made(), made()
        train(model, optimizer, range(before))
        train(other, plain, range(before))
        undo = Undo(model, optimizer)
        saved = undo.save()
        train(model, optimizer, (10, 11, 12))
        undo.restore(saved)
        train(model, optimizer, (10,))
        undo.restore(saved)  # what was saved is good for more than once
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        train(model, optimizer, (20, 21))
        train(other, plain, (20, 21))
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class Repeating:
    """Text by a rule with slips; a share of the windows is one of a few, each time with one token changed."""

    source_names = ("text", "repeated")

    def __init__(self, share, position=0):
        self.share, self.position = share, position
        generator = torch.Generator().manual_seed(99)
        self.known = self._text(6, generator)

    def _text(self, n, generator):
        start = torch.randint(0, V, (n, 1), generator=generator)
        tokens = (start + torch.arange(T + 1) * 3) % V
        slips = torch.rand(n, T + 1, generator=generator).argsort(1)[:, :8]
        return tokens.scatter_(1, slips, torch.randint(0, V, (n, 8), generator=generator))

    def take(self, n):
        generator = torch.Generator().manual_seed(self.position)
        self.position += n
        tokens = self._text(n, generator)
        again = torch.rand(n, generator=generator) < self.share
        tokens[again] = self.known[torch.randint(0, 6, (int(again.sum()),), generator=generator)]
        tokens[again, -1] = torch.randint(0, V, (int(again.sum()),), generator=generator)
        return Batch(tokens, again.to(torch.int8), torch.arange(self.position - n, self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = int(state["position"])


class NoMoments:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


class Run:
    """A training loop in miniature: the gate's calls in the trainer's order, on a clock of steps."""

    def __init__(self, share, total, held_out=True, **changes):
        torch.manual_seed(0)
        shape = ModelConfig(width=16, layers=1, heads=2, context=T, vocab_size=V, attention="explicit")
        self.model, self.total, self.step, self.trace = Transformer(shape), total, 0, []
        cfg = GateConfig(name="auto", unit="auto", pool_windows=32, ngram_bits=12)
        judges = Repeating(0.0, 10**6).take(32).tokens if held_out else None
        context = GateContext(V, T, 0, model=self.model, judges=judges, undo=Undo(self.model, NoMoments()))
        again = {"least_steps": 3, "judges": 32, "steps_share": 0.06, "phases": (0.1, 0.3), "remember": 128, **changes}
        self.gate = AutoGate(cfg, Repeating(share), context, AutoConfig(strata=8), AgainConfig(**again))

    def go(self, steps):
        for _ in range(steps):
            progress = self.step / self.total
            batch = self.gate.next(B, progress)
            branch = self.gate.trials.branch
            before = {k: v.clone() for k, v in self.model.state_dict().items()}
            x, y = batch.tokens[:, :-1], batch.tokens[:, 1:]
            loss_BT = token_loss(self.model(x), y)
            loss_BT.mean().backward()
            with torch.no_grad():
                for p in self.model.parameters():
                    p -= 0.5 * p.grad
                    p.grad = None
            loss_BT = loss_BT.detach()
            self.gate.observe(batch, SparseStep(loss_BT, {}, Chosen(), View(loss_BT)), progress, 1.0)
            self.step += 1
            self.trace.append((batch, branch, before, self.gate.trials.branch))
        return self


@pytest.mark.parametrize("held_out", [True, False])
def test_a_run_tries_goes_back_and_counts_what_it_did(held_out):
    run = Run(0.5, 120, held_out, sigma=-1e9, doubt=1e9).go(60)  # whatever the trial finds, it is believed
    gate, length = run.gate, run.gate.trials.length
    branches = [branch for _, branch, *_ in run.trace]
    start = branches.index("again")
    assert branches[start : start + 2 * length] == ["again"] * length + ["new"] * length
    assert length == int(0.06 * start / (start / 120))
    for which, source in (("again", 1), ("new", 0)):
        sources = torch.cat([batch.source for batch, branch, *_ in run.trace if branch == which])
        assert (sources == source).float().mean() > 0.85
    # the state before the branch of repeats is the state before that of new windows
    at_start, at_back = run.trace[start][2], run.trace[start + length][2]
    assert all(torch.equal(at_start[k], at_back[k]) for k in at_start)
    assert not all(torch.equal(at_start[k], run.trace[start + length - 1][2][k]) for k in at_start)
    assert gate.uses[SCORING_FORWARD] == 3 * 32
    flops = plan_flops(run.model.cfg, 32, PLAIN, None, T).forward
    looked = gate.windows_offered + (32 if held_out else 0)  # what judges is looked up once, where it is not of the stream
    assert gate.uses[gate.containment.cost_key] == looked
    assert gate.scoring_flops == 3 * flops + gate.containment.flops(looked) + gate.signal.flops(gate.windows_scored)
    # the verdict: repeats are left out from then on
    assert [d["decision"] for d in gate.decisions if d["decision"].startswith("again")] == ["again: drop"]
    later = torch.cat([batch.source for batch, *_ in run.trace[start + 2 * length + 12 :]])
    assert later.float().mean() < 0.1
    assert gate.notes()["auto/drops_seen"] == 1.0


def test_windows_that_waited_for_a_trial_are_trained_on_where_repeats_are_kept():
    run = Run(0.5, 120, sigma=1e9, doubt=-1e9).go(110)
    assert run.gate.trials.again.verdict == "keep"
    assert run.gate.trials.held is None
    shown = torch.cat([batch.window for batch, branch, *_ in run.trace if branch != "again"])
    assert len(shown.unique()) == len(shown)
    assert set(range(int(0.8 * len(shown)))) <= set(shown.tolist())  # nothing is lost on the way
    assert sum(run.gate.kept_by_source.tolist()) == run.gate.windows_offered


def test_text_that_repeats_itself_where_the_run_never_looks_is_kept_without_a_trial():
    run = Run(0.5, 120, sigma=-1e9, doubt=1e9)
    run.gate.context.judges[::3] = Repeating(1.0).take(len(run.gate.context.judges[::3])).tokens
    untouched, told = copy.deepcopy(run.gate.containment.state_dict()), []
    run.gate._seen(run.gate.context.judges)
    after = run.gate.containment.state_dict()
    assert all(torch.equal(untouched[name], after[name]) for name in untouched)
    run.gate.trials.again.look_at_judges = lambda at, seen: (
        told.append(seen) or Again.look_at_judges(run.gate.trials.again, at, seen)
    )
    run.go(60)
    assert [seen.nonzero()[:, 0].tolist() for seen in told] == [list(range(0, 32, 3))]
    (found,) = (d for d in run.gate.decisions if d["decision"].startswith("again"))
    assert found["decision"] == "again: keep"
    assert found["seen_share_of_judges"] == pytest.approx(11 / 32)
    assert run.gate.uses[SCORING_FORWARD] == 0
    assert run.gate.kept_share() == {"text": 1.0, "repeated": 1.0}
    assert run.gate.trials.held is None


@pytest.mark.parametrize(("judged", "tried"), [(0.0, True), (0.19, True), (0.21, False), (0.6, False)])
def test_a_trial_is_made_where_judges_are_seen_less_than_half_as_often_as_the_stream(judged, tried):
    again = seen(Again(AgainConfig()), 0.4)
    assert again.look_at_judges(0.2, torch.arange(200) < 200 * judged) == tried
    assert again.verdict == ("open" if tried else "keep")
    assert again.due(0.2) == tried


def test_a_stream_without_repeats_is_passed_on_and_costs_no_trial():
    run = Run(0.0, 80, contained=0.9).go(80)
    assert not run.gate.trials.again.trials
    assert run.gate.uses[SCORING_FORWARD] == 0
    assert run.gate.kept_share() == {"text": 1.0}


def test_without_a_way_back_nothing_is_tried():
    run = Run(0.5, 60)
    run.gate.trials.context = GateContext(V, T, 0, model=run.model)
    assert SCORING_FORWARD not in run.gate.components()
    assert not any(branch for _, branch, *_ in run.go(60).trace)


def test_the_state_of_a_version_without_trials_is_refused_by_name():
    run = Run(0.5, 60)
    state = {key: value for key, value in run.gate.state_dict().items() if key != "trials"}
    with pytest.raises(ValueError, match="finish that run with the version that began it"):
        run.gate.load_state_dict(state)


@pytest.mark.parametrize("cut", [5, 14, 18, 22, 28, 45])
def test_resumes_bit_for_bit_before_in_and_after_a_trial(cut):
    whole = Run(0.5, 120).go(cut)
    tensors, outline = pack(whole.gate.state_dict())
    saved = unpack(outline, {k: v.clone() for k, v in tensors.items()})
    weights = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.go(30)
    other = Run(0.5, 120)
    other.step = cut
    other.model.load_state_dict(weights)
    other.gate.load_state_dict(saved)
    other.go(30)
    for (a, branch, before, _), (b, branch_too, before_too, _) in zip(whole.trace[cut:], other.trace, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert branch == branch_too
        assert all(torch.equal(before[k], before_too[k]) for k in before)
    assert whole.gate.decisions == other.gate.decisions
    assert whole.gate.uses == other.gate.uses
