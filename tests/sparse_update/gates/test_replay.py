"""Replay of what is being forgotten: foretold as plain dicts of runs of tokens do, chosen, charged, and resumed exactly."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update.clock.component import SCORING_FORWARD
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.regimes import held_out, make_stream
from sparse_update.gates.choice import make_gate
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import GateContext
from sparse_update.gates.replay import FADES, STRENGTH, Forgetting, probe_windows
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.signals import SignalError
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

T = 16
SHAPE = {"width": 16, "layers": 2, "heads": 2, "context": T, "vocab_size": 256, "attention": "explicit"}
KEEP = {"unit": "sequence", "signal": "novelty", "keep_fraction": 0.5, "pool_windows": 32}
NOVELTY = {"signal_options": {"bits": 12}}
FORGOTTEN = {"replay": "forgotten", "replay_fraction": 0.5, "replay_probe_windows": 6, "replay_every": 0.2}


def by_hand(probe, losses, tokens):
    """What is lost of windows by dicts of runs, from the losses of a probe at first and then once or more."""
    means = [float((later - losses[0]).mean()) for later in losses[1:]]

    def run(row, at, order):
        return (at < order - 1, *row[max(0, at - order + 1) : at + 1].tolist())

    found = []
    for row in tokens:
        values = []
        for at in range(1, len(row)):
            value = means[-1]
            for order in (1, 2, 3):
                lost = seen = 0.0
                for later in losses[1:]:
                    lost, seen = FADES * lost, FADES * seen
                    for i, own in enumerate(probe):
                        for j in range(1, len(own)):
                            if run(own, j, order) == run(row, at, order):
                                lost += float(later[i, j - 1] - losses[0][i, j - 1])
                                seen += 1
                value = (lost + STRENGTH * value) / (seen + STRENGTH)
            values.append(value)
        found.append(np.mean(values))
    return found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), probes=st.integers(1, 3))
def test_what_is_lost_is_foretold_by_runs_of_tokens_from_short_to_long(seed, probes):
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randint(0, 3, (3, 6), generator=generator)
    tokens = torch.randint(0, 4, (4, 6), generator=generator)  # 3 is a token that the probe lacks
    losses = [torch.rand(3, 5, generator=generator) for _ in range(probes + 1)]
    forgetting = Forgetting(probe)
    for loss in losses:
        forgetting.measure(loss)
    assert forgetting.probes == probes
    assert forgetting.score(tokens).tolist() == pytest.approx(by_hand(probe, losses, tokens), abs=1e-5)


def test_how_much_is_lost_says_how_much_is_replayed():
    forgetting = Forgetting(torch.zeros(2, 5, dtype=torch.int64))
    forgetting.measure(torch.full((2, 4), 1.0))
    assert (forgetting.share(0.5, 0.1), forgetting.share(0.5, 0.0)) == (0.0, 0.5)
    for lost, share in ((0.02, 0.1), (0.1, 0.5), (3.0, 0.5), (-0.2, 0.0)):
        forgetting.measure(torch.full((2, 4), 1.0 + lost))
        assert forgetting.mean == pytest.approx(lost)
        assert forgetting.share(0.5, 0.1) == pytest.approx(share)
    forgetting.measure(torch.full((2, 4), float("nan")))
    assert forgetting.mean == pytest.approx(-0.2)  # says nothing


@pytest.mark.parametrize(("length", "count", "expected"), [(100, 3, 3), (100, 50, 6), (17, 2, 1)])
def test_a_probe_is_windows_of_the_known_text_spread_over_it(length, count, expected):
    known = torch.arange(length)
    probe = probe_windows(known, count, T)
    assert probe.shape == (expected, T + 1)
    assert torch.equal(probe, probe[:, :1] + torch.arange(T + 1))
    assert bool((probe[:, 0] % T == 0).all())
    assert len(probe[:, 0].unique()) == expected
    with pytest.raises(ValueError, match="fewer than a window"):
        probe_windows(torch.arange(T), 3, T)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Known text of few words and new text of many others."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for part, (low, high) in {"known": (97, 105), "new": (105, 123)}.items():
        (folder / part).mkdir()
        words = [bytes(generator.integers(low, high, generator.integers(2, 6)).astype(np.uint8)) for _ in range(60)]
        for i in range(12):
            picks = generator.integers(5 * i % 40, 60, 700)
            (folder / part / f"{i}.txt").write_bytes(b" ".join(words[j] for j in picks))
    domains = [f"files:{folder / part}" for part in ("known", "new")]
    cfg = DataConfig(name="domains", domains=domains, regime="familiar", known_fraction=0.7)
    return cfg, load_corpus(cfg)


def gate_of(corpus, known=True, seed=0, **kw):
    cfg, text = corpus
    torch.manual_seed(0)
    context = GateContext(
        256, T, seed, model=Transformer(ModelConfig(**SHAPE)), known_tokens=text.known_tokens if known else None
    )
    return make_gate(GateConfig(**{**KEEP, **NOVELTY, **kw}), make_stream(text, cfg, T, 0), context)


def shake(gate, seed):
    """Make the model forget something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gate.context.model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)


def test_the_windows_that_are_losing_most_are_replayed_and_all_of_it_is_charged(corpus):
    gate, plain = gate_of(corpus, **FORGOTTEN), gate_of(corpus)
    model, probe = gate.context.model, gate.forgetting.probe_MT1
    losses = []

    def measured():
        with torch.no_grad():
            losses.append(token_loss(model(probe[:, :-1]), probe[:, 1:]))

    measured()
    gate.next(16, 0.0)  # the first pool: nothing is known to be lost yet, so a draw
    assert gate.uses == {SCORING_FORWARD: 6, "signal[novelty]": 32}
    shake(gate, 1)
    measured()
    second = gate.next(16, 0.25)
    pool = make_stream(corpus[1], corpus[0], T, 0).read(32, 32)
    score = gate.signal.table.score(pool.tokens).mean(1)  # nothing was trained on: the table is as it was
    order = score.argsort(descending=True, stable=True)
    lost = torch.tensor(by_hand(probe, losses, pool.tokens[order[8:]]))
    rows = (second.tokens[:, None] == pool.tokens[order][None]).all(-1).any(0).nonzero()[:, 0].tolist()
    assert rows[:8] == list(range(8))  # the policy's own
    assert len(rows) == 16
    assert lost[torch.tensor(rows[8:]) - 8].mean() > lost.mean()
    draw = torch.Generator().manual_seed(1)
    for count in (24, 24):  # a draw of each pool
        drawn = torch.randperm(count, generator=draw)[:16]
    left = order[8:].sort().values[drawn]  # of twice as many windows, those that lost most
    lost = torch.tensor(by_hand(probe, losses, pool.tokens[left]))
    expected = torch.cat((order[:8], left[lost.argsort(descending=True)[:8]])).sort().values
    assert torch.equal(second.tokens, pool.tokens[expected])
    assert gate.uses == {SCORING_FORWARD: 12, "signal[novelty]": 64 + 16}
    flops = 2 * plan_flops(model.cfg, 6, PLAIN, None, T).forward + gate.signal.flops(64 + 16)
    assert gate.scoring_flops == flops
    gate.next(16, 0.3)  # not due: between two probes
    assert gate.uses[SCORING_FORWARD] == 12
    assert set(gate.components()) == {SCORING_FORWARD, "signal[novelty]"}
    assert set(plain.components()) == {"signal[novelty]"}
    assert gate.notes()["replay/forgotten_nats"] == pytest.approx(float((losses[1] - losses[0]).mean()))
    assert gate.notes()["replay/share"] == 0.5
    assert "replay/share" not in plain.notes()


def test_nothing_is_replayed_where_nothing_is_lost(corpus):
    gate, plain = gate_of(corpus, **FORGOTTEN, replay_limit_nats=0.1), gate_of(corpus)
    for progress in (0.0, 0.3, 0.6):
        assert torch.equal(gate.next(16, progress).tokens, plain.next(16, progress).tokens)
    assert gate.forgetting.mean == 0.0


def test_the_control_draws_as_many_among_what_is_left_out(corpus):
    gate, plain = gate_of(corpus, replay="rest", replay_fraction=0.5), gate_of(corpus, keep_fraction=0.25)
    shown = []
    for _ in range(12):
        both, best = gate.next(16).tokens, plain.next(8).tokens
        rows = (both[:, None] == best[None]).all(-1)
        assert rows.any(0).all()  # the policy's own choice is part of it
        shown.append(both[~rows.any(1)])
    assert {len(rest) for rest in shown} == {8}
    assert gate.uses == plain.uses  # and it costs no more
    again = gate_of(corpus, replay="rest", replay_fraction=0.5, seed=5)
    assert any(not torch.equal(again.next(16).tokens, x) for x in shown[:1])  # drawn by the seed


@pytest.mark.parametrize(
    "kw", [FORGOTTEN, {**FORGOTTEN, "replay_limit_nats": 3.0}, {"replay": "rest", "replay_fraction": 0.25}]
)
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_gate_resumes_exactly_between_probes_and_in_a_pool(corpus, kw, cut):
    def go(gate, first, stop):
        found = []
        for i in range(first, stop):
            found.append(gate.next(6, i / 12).tokens)
            shake(gate, i)
        return found

    whole = gate_of(corpus, **kw)
    go(whole, 0, cut)
    other = gate_of(corpus, seed=7, **kw)
    other.load_state_dict(whole.state_dict())
    other.context.model.load_state_dict(whole.context.model.state_dict())
    expected, uses = go(whole, cut, 12), whole.uses
    assert all(torch.equal(a, b) for a, b in zip(go(other, cut, 12), expected, strict=True))
    assert other.uses == uses
    assert other.notes() == whole.notes()


def build(corpus, folder, report=lambda report: None):
    cfg, text = corpus
    torch.manual_seed(0)
    model, optim, table = Transformer(ModelConfig(**SHAPE)), OptimConfig(), shipped_table()
    times = table.times(model.cfg, optim, 4, torch.device("cpu"), "fp32", False)
    return make_trainer(
        model,
        Arm(GateConfig(**KEEP, **NOVELTY, **FORGOTTEN, replay_limit_nats=0.2), SubsetConfig(), optim),
        TrainerConfig(budget_reference_s=24 * times.dense_ms / 1000, batch_windows=4, log_every_steps=1, evaluations=1),
        Text(make_stream(text, cfg, T, 0), held_out(text, cfg, T, 256), text.known_tokens),
        Prices(times, lambda found, todo, parts: table.extended(found, model.cfg, optim, todo, parts)),
        Place(folder),
        0,
        Listeners(report),
    )


def test_a_run_resumes_to_the_bit_and_its_probes_are_on_the_clock(corpus, tmp_path):
    reports = []
    whole = build(corpus, tmp_path / "whole", reports.append)
    expected = whole.run()
    assert expected.gate_reference_s > 0
    clock = whole.budget.clock
    assert clock.other_reference_s == pytest.approx(
        sum(count * clock.times.ms_of(key) / 1000 for key, count in whole.gate.uses.items())
    )
    assert whole.gate.uses[SCORING_FORWARD] == 6 * len({int(r.notes["replay/forgotten_nats"] * 1e9) for r in reports} | {0})
    cut = len(reports) // 2
    first = build(
        corpus, tmp_path / "cut", lambda report: os.kill(os.getpid(), signal.SIGINT) if report.step == cut else None
    )
    assert first.run().step == cut
    second = build(corpus, tmp_path / "cut")
    torch.manual_seed(99)
    second.resume(tmp_path / "cut" / "checkpoint")
    found = second.run()
    for name in ("step", "flops", "reference_s", "val_loss_nats", "windows_offered", "held_out"):
        assert getattr(found, name) == getattr(expected, name), name
    for name, tensor in second.updates.model.state_dict().items():
        assert torch.equal(tensor, whole.updates.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("kw", "word"),
    [
        ({"replay": "best"}, "one of uniform, rest, forgotten"),
        ({**FORGOTTEN, "replay_fraction": 0.0}, "replays nothing"),
        ({**FORGOTTEN, "signal": "token_loss"}, "one of the signals ngram, novelty"),
        ({**FORGOTTEN, "unit": "repeats", "repeats": 2}, "needs unit sequence"),
        ({**FORGOTTEN, "unit": "token", "signal": "token_loss"}, "so unit sequence or repeats"),
        ({"replay": "rest", "replay_fraction": 0.5, "signal": "random"}, "by a signal"),
        ({"replay": "rest", "replay_fraction": 0.5, "policy": "cdf"}, "as many as the data says"),
        ({**FORGOTTEN, "replay_every": 0.0}, "replay_every"),
        ({**FORGOTTEN, "replay_probe_windows": 0}, "replay_probe_windows"),
        ({**FORGOTTEN, "replay_limit_nats": float("nan")}, "replay_limit_nats"),
    ],
)
def test_settings_that_cannot_be_are_refused(kw, word):
    with pytest.raises(ValueError, match=word):
        GateConfig(**{**KEEP, **kw})


def test_without_known_text_and_from_another_run_it_is_refused(corpus):
    with pytest.raises(SignalError, match="needs text that the model knows"):
        gate_of(corpus, known=False, **{**FORGOTTEN, "signal": "ngram", "signal_options": {}})
    state = gate_of(corpus).state_dict()
    with pytest.raises(ValueError, match="resume with the settings of that run"):
        gate_of(corpus, **FORGOTTEN).load_state_dict(state)
