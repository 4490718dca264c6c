"""The auto gate on a model that grows: it observes, tries and pays for the model that runs, and a run resumes."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from sparse_update.clock.component import SCORING_FORWARD, at_depth, depth_of
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.records import Batch
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig, Controller
from sparse_update.gates.deciding.again import Again, AgainConfig
from sparse_update.gates.deciding.auto import OBSERVE
from sparse_update.growth.settings import GrowthConfig
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

T, B, V = 64, 4, 32
SHAPE = {"width": 16, "layers": 3, "heads": 2, "context": T, "vocab_size": V, "attention": "explicit"}
ONE = ModelConfig(**{**SHAPE, "layers": 1})
CPU = torch.device("cpu")


class Stream:
    """Text by a rule with slips; three windows in ten are noise, three are one of four, with one token changed."""

    source_names = ("text", "noise", "repeated")

    def __init__(self):
        self.position = 0
        self.known = self._text(4, torch.Generator().manual_seed(7))

    def _text(self, n, generator):
        tokens = (torch.randint(0, V, (n, 1), generator=generator) + torch.arange(T + 1) * 3) % V
        slips = torch.rand(n, T + 1, generator=generator).argsort(1)[:, :4]
        return tokens.scatter_(1, slips, torch.randint(0, V, (n, 4), generator=generator))

    def take(self, n):
        found = []
        for at in range(self.position, self.position + n):  # window by window: the same however it is asked for
            generator = torch.Generator().manual_seed(at)
            tokens, kind = self._text(1, generator), int(torch.randint(0, 10, (), generator=generator))
            if kind < 3:
                tokens = torch.randint(0, V, (1, T + 1), generator=generator)
            elif kind < 6:
                tokens = self.known[at % 4 : at % 4 + 1].clone()
                tokens[0, -1] = int(torch.randint(0, V, (), generator=generator))
            found.append((tokens, 1 if kind < 3 else 2 if kind < 6 else 0))
        self.position += n
        source = torch.tensor([s for _, s in found], dtype=torch.int8)
        return Batch(torch.cat([t for t, _ in found]), source, torch.arange(self.position - n, self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = int(state["position"])


def build(folder, steps=60.0, until=0.5, report=lambda report: None, phases=(0.1, 0.2), times=None, growth=True):
    """A run of about so many steps of the whole model, more of the small one; it looks often and tries early."""
    torch.manual_seed(0)
    model, optim, table = Transformer(ModelConfig(**SHAPE)), OptimConfig(name="muon"), shipped_table()
    times = times or table.times(model.cfg, optim, B, CPU, "fp32", False)
    trainer = make_trainer(
        model,
        Arm(
            GateConfig(name="auto", unit="auto", pool_windows=16, ngram_bits=12),
            SubsetConfig(),
            optim,
            GrowthConfig("depth", "depth", start_layers=1, until=until) if growth else GrowthConfig(),
        ),
        TrainerConfig(budget_reference_s=steps * times.dense_ms / 1000, batch_windows=B, log_every_steps=1, evaluations=1),
        Text(Stream(), {"val": Stream().take(16).tokens}, judges=Stream().take(8).tokens),
        Prices(times, lambda found, todo, parts: table.extended(found, ModelConfig(**SHAPE), optim, todo, parts)),
        Place(folder),
        0,
        Listeners(report),
    )
    trainer.gate.controller = Controller(
        AutoConfig(
            strata=4, least=6, apart=0.25, phases=(0.03, 0.3, 0.6, 0.8), quotas=(0.1, 0.2, 0.4, 0.6), probe_share=1 / 8
        )
    )
    again = AgainConfig(
        least_share=0.1, judges=8, least_steps=3, steps_share=0.05, phases=phases, remember=64, latest=0.9, alike=1e9,
        sigma=1e9, doubt=-1e9,  # no trial settles it, so that there are as many as phases; what judges repeats too
    )  # fmt: skip
    trainer.gate.trials.again = Again(again)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    reports, states = [], []

    def note(report):
        gate = trainer.gate
        reports.append(report)
        states.append((len(trainer.updates.model.blocks), gate.trials.branch, gate.controller.state, dict(gate.uses)))

    trainer = build(tmp_path_factory.mktemp("whole"), report=note)
    return trainer, trainer.run(), reports, states


def test_what_is_observed_and_judged_is_charged_at_the_depth_that_runs(whole):
    trainer, result, _, states = whole
    gate, clock = trainer.gate, trainer.budget.clock
    depths = [depth for depth, *_ in states]
    assert set(depths) == {1, 3}
    grown = depths.index(3)
    before, after = states[grown][-1], gate.uses
    small = {key: count for key, count in before.items() if depth_of(key)[0] in (OBSERVE, SCORING_FORWARD)}
    assert small == {at_depth(OBSERVE, 1): small[at_depth(OBSERVE, 1)], at_depth(SCORING_FORWARD, 1): 2 * 3 * 8}
    assert small[at_depth(OBSERVE, 1)] > 0
    assert after[OBSERVE] > 0  # it looks again at the grown model
    assert {key: after[key] for key in small} == small  # and never again at the small one
    assert gate.controller.observed == (after[OBSERVE] + small[at_depth(OBSERVE, 1)]) // B
    # FLOPs: six matrices a block; the last four layers of seven, the last five of nineteen
    layers = {n: [m.weight.numel() for m in Transformer(ModelConfig(**{**SHAPE, "layers": n})).modules()
                  if isinstance(m, torch.nn.Linear)] for n in (1, 3)}  # fmt: skip
    assert (len(layers[1]), len(layers[3])) == (7, 19)
    observing = 2 * T * (small[at_depth(OBSERVE, 1)] * sum(layers[1][-4:]) + after[OBSERVE] * sum(layers[3][-5:]))
    judging = 6 * plan_flops(ONE, 8, PLAIN, None, T).forward
    scoring = gate.signal.flops(gate.windows_scored) + gate.containment.flops(gate.windows_offered + 2 * 8)
    assert gate.flops == observing + judging + scoring
    steps = Transformer(ONE).cfg, trainer.updates.model.cfg
    counts = (depths.count(1) + 1, depths.count(3) - 1)  # a report is made after growing
    assert result.flops == gate.flops + sum(
        count * plan_flops(cfg, B, PLAIN, None, T).total for cfg, count in zip(steps, counts, strict=True)
    )
    # prices: those of a run whose model has one block from the first step to the last
    table, optim = shipped_table(), OptimConfig(name="muon")
    parts = {depth_of(key)[0]: part for key, part in gate.components().items() if depth_of(key)[1] == 1}
    alone = table.extended(table.times(ONE, optim, B, CPU, "fp32", False), ONE, optim, [], parts)
    for key in (OBSERVE, SCORING_FORWARD):
        assert clock.times.ms_of(at_depth(key, 1)) == pytest.approx(alone.ms_of(key))
        assert clock.times.ms_of(at_depth(key, 1)) < clock.times.ms_of(key)
    assert result.reference_s == pytest.approx(
        sum(n * clock.times.ms_of(key) / 1000 for uses in (clock.uses, gate.uses) for key, n in uses.items())
    )


def test_decisions_outlive_the_expansion_and_observations_do_not(whole):
    trainer, _, _, states = whole
    grown = [depth for depth, *_ in states].index(3)
    decisions = [d for d in trainer.gate.decisions if d["progress"] < 0.5]
    assert len([d for d in decisions if d["decision"].startswith("again")]) == 2
    assert [d for d in decisions if d["decision"] in ("on", "off")]
    assert states[grown][2] == states[grown - 1][2]
    observed = trainer.gate.controller
    assert len(observed.sums) <= trainer.gate.uses[OBSERVE] // B


def moments(states):
    depths, branches = [s[0] for s in states], [s[1] for s in states]
    grown = depths.index(3)
    return {"in a trial": branches.index("again") + 2, "between branches": branches.index("new") + 1, "before": grown,
            "at": grown + 1, "after": grown + 2, "late": len(states) - 5}  # fmt: skip


@pytest.mark.parametrize("when", ["in a trial", "between branches", "before", "at", "after", "late"])
def test_an_interrupted_run_resumes_to_the_bit(whole, tmp_path, when):
    trainer, expected, reports, states = whole
    cut = moments(states)[when]
    first = build(tmp_path, report=lambda r: os.kill(os.getpid(), signal.SIGINT) if r.step == cut else None)
    assert first.run().step == cut
    again = []
    second = build(tmp_path, report=again.append, times=first.budget.clock.times)
    torch.manual_seed(99)
    second.resume(tmp_path / "checkpoint")
    found = second.run()
    for name in ("step", "tokens", "flops", "reference_s", "val_loss_nats", "windows_offered", "gate_decisions"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [r.loss_nats for r in again] == [r.loss_nats for r in reports[cut:]]
    assert second.gate.uses == trainer.gate.uses
    for name, tensor in second.updates.model.state_dict().items():
        assert torch.equal(tensor, trainer.updates.model.state_dict()[name]), name


def test_no_trial_begins_that_the_expansion_would_break_off(tmp_path):
    lengths = []
    for until in (0.25, 0.5):
        trainer = build(tmp_path / str(until), until=until, phases=(0.22,))
        trainer.run()
        lengths.append([d["progress"] for d in trainer.gate.decisions if d["decision"].startswith("again")])
    (late,), (early,) = lengths
    assert early < 0.5  # the same trial, with time enough before the model grows
    assert late > 0.25  # and here it waits for the grown model


def test_a_trial_that_the_expansion_meets_is_taken_back_and_forgotten(tmp_path):
    """As a run would have it whose steps got dearer than the trial foresaw."""
    held, states = {}, []
    trainer = build(tmp_path, until=0.25, phases=(0.22,))
    object.__setattr__(trainer.gate.context, "changes_at", 2.0)  # nothing is foreseen
    save, grow = trainer.gate.context.undo.save, trainer.gate.before_growth

    def saving():
        held.setdefault("state", save())
        return save()

    def growing():
        assert trainer.gate.trials.branch == "again"
        grow()
        states.append({k: v.clone() for k, v in trainer.updates.model.state_dict().items()})

    object.__setattr__(trainer.gate.context.undo, "save", saving)
    trainer.updates.before_growth = growing
    trainer.records.listeners.on_report = lambda r: None
    result = trainer.run()
    assert result.finished
    assert all(torch.equal(states[0][k], v) for k, v in held["state"]["model"].items())
    assert [d["progress"] > 0.25 for d in trainer.gate.decisions if d["decision"].startswith("again")] in ([], [True])
    assert len(trainer.updates.model.blocks) == 3


def test_a_window_is_dearer_to_score_where_training_on_it_is_cheaper(tmp_path):
    gate = build(tmp_path).gate
    full = ModelConfig(**SHAPE)
    ratio = plan_flops(full, 1, PLAIN, None, T).total / plan_flops(ONE, 1, PLAIN, None, T).total
    assert gate._price() == pytest.approx(gate.controller.cfg.price * ratio)
    assert build(tmp_path, growth=False).gate._price() == gate.controller.cfg.price


def test_every_component_can_be_timed_at_every_depth(tmp_path):
    components = build(tmp_path).gate.components()
    assert {depth_of(key) for key in components if depth_of(key)[0] in (OBSERVE, SCORING_FORWARD)} == {
        (name, depth) for name in (OBSERVE, SCORING_FORWARD) for depth in (1, None)
    }
    for component in components.values():
        component.make()()
