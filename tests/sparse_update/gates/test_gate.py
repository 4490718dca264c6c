"""Gates unit by unit: what they hand out, choose and charge; exact resume; settings that cannot work refused by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.stream import WindowStream
from sparse_update.gates.choice import make_gate
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import Gate, GateContext
from sparse_update.gates.rates import Rate
from sparse_update.gates.sampling import distance
from sparse_update.step.plan import SparseStep, StepPlan, View
from sparse_update.transformer import ModelConfig, Transformer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8)).astype(np.uint8)) for _ in range(300)]
    for i in range(20):
        picks = generator.integers(0, 300, 4000) % generator.integers(20, 300)
        (folder / f"{i}.txt").write_bytes(b" ".join(words[j] for j in picks))
    return load_corpus(DataConfig(name="files", path=str(folder)))


def gate_of(corpus, seed=0, garbage=0.3, **kw):
    cfg = GateConfig(
        **{"unit": "sequence", "signal": "ngram", "keep_fraction": 0.7, "noise_cut": 0.2, "pool_windows": 64, **kw}
    )
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=3, heads=2, context=32, vocab_size=256, attention="explicit"))
    context = GateContext(corpus.vocab_size, 32, seed, model=model)
    return make_gate(cfg, WindowStream(corpus, 32, seed=seed, garbage_fraction=garbage), context)


def rates(**kw):
    return {"noise_cut": 0.0, **kw}


def test_a_plain_gate_is_the_stream_itself(corpus):
    gate = gate_of(corpus, 3, 0.0, unit="none", signal="none", keep_fraction=1.0, noise_cut=0.0)
    stream = WindowStream(corpus, 32, seed=3)
    for _ in range(5):
        assert torch.equal(gate.next(8).tokens, stream.take(8).tokens)
    assert gate.plan(0.5, 8, 32) == StepPlan()
    assert gate.windows_scored == 0
    assert gate.kept_share() == {"clean": 1.0}


@pytest.mark.parametrize("signal", ["ngram", "random"])
def test_batches_have_one_shape_and_the_rate_is_exact(corpus, signal):
    gate = gate_of(corpus, signal=signal, noise_cut=0.2 if signal == "ngram" else 0.0)
    for _ in range(40):
        assert gate.next(16).tokens.shape == (16, 33)
    assert gate.keep_fraction() == pytest.approx(round(64 * 0.7) / 64)
    scored = gate.windows_offered if signal == "ngram" else 0
    assert gate.windows_scored == scored
    assert dict(gate.uses) == ({"signal[ngram]": scored} if scored else {})
    assert gate.flops >= scored


def test_surprise_drops_the_garbage_that_random_keeps(corpus):
    surprise, control = gate_of(corpus), gate_of(corpus, signal="random", noise_cut=0.0)
    for gate in (surprise, control):
        for _ in range(60):
            gate.next(32)
    kept, kept_at_random = surprise.kept_share(), control.kept_share()
    assert kept["random"] < 0.1
    assert kept["clean"] > 0.8
    assert all(0.55 < share < 0.85 for share in kept_at_random.values())


def test_replayed_windows_are_a_uniform_draw(corpus):
    """With only replay, the share kept of each source is the rate's; with none, the garbage is gone."""
    gate = gate_of(corpus, replay_fraction=0.95)
    for _ in range(60):
        gate.next(32)
    assert all(0.55 < share < 0.85 for share in gate.kept_share().values())
    assert gate.keep_fraction() == pytest.approx(round(64 * 0.7) / 64)


def test_the_last_share_of_the_budget_is_not_gated(corpus):
    gate = gate_of(corpus, anneal_fraction=0.2)
    gate.next(16, 0.1)
    offered = gate.windows_offered
    queued = gate.waiting
    for _ in range(10):
        gate.next(16, 0.85)
    assert 0 <= gate.windows_offered - offered - (160 - queued) < 16  # nothing dropped: no more than a batch ahead
    assert gate.windows_scored == offered


@pytest.mark.parametrize(
    "kw",
    [
        {"signal": "ngram"},
        {"signal": "random", "noise_cut": 0.0},
        {"signal": "token_loss", "policy": "cdf", "noise_cut": 0.0},
        {"signal": "stale_loss", "policy": "soft", "noise_cut": 0.0, "keep_fraction": 1.0},
        {"unit": "repeats", "repeats": 4, "keep_fraction": 0.25},
        {"signal": "ngram", "replay_fraction": 0.25},
    ],
)
def test_resume_is_exact_in_the_middle_of_a_pool(corpus, kw):
    first = gate_of(corpus, **kw)
    for _ in range(7):
        first.next(16)
    second = gate_of(corpus, seed=9, **kw)  # other seeds: all must come from the state
    second.stream = WindowStream(corpus, 32, seed=0, garbage_fraction=0.3)
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        a, b = first.next(16), second.next(16)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.source, b.source)
        assert (a.weight_B is None) == (b.weight_B is None)
    assert first.kept_share() == second.kept_share()
    assert first.uses == second.uses


def test_a_signal_out_of_the_forward_is_charged_a_scoring_forward(corpus):
    gate = gate_of(corpus, signal="token_loss", policy="top", noise_cut=0.0, keep_fraction=0.25)
    batch = gate.next(16)
    assert gate.uses["scoring_forward"] == 64
    assert set(gate.components()) == {"scoring_forward"}
    pool = WindowStream(corpus, 32, seed=0, garbage_fraction=0.3).take(64)
    from sparse_update.transformer import token_loss

    with torch.no_grad():
        loss = token_loss(gate.context.model(pool.tokens[:, :-1]), pool.tokens[:, 1:]).mean(-1)
    expected = loss.topk(16).indices.sort().values
    assert torch.equal(batch.tokens, pool.tokens[expected])


def test_weights_of_soft_pruning_reach_the_batch_with_mean_one(corpus):
    gate = gate_of(
        corpus, signal="stale_loss", policy="soft", keep_fraction=1.0, noise_cut=0.0, garbage=0.0, pool_windows=600
    )
    seen = gate.next(600)  # nothing has a loss yet
    assert seen.weight_B is None
    step = SparseStep(torch.rand(600, 1).expand(600, 32), {}, None, None)
    gate.observe(seen, step, 0.1, 1.0)
    gate.stream.position = 0  # the same windows once more
    again = gate.next(400)
    light, heavy = again.weight_B.unique().tolist()
    assert heavy == pytest.approx(2 * light)
    loss = {int(w): float(value) for w, value in zip(seen.window, step.loss_BT.mean(-1), strict=True)}
    below = torch.tensor([loss[int(w)] for w in again.window]) < step.loss_BT.mean()
    assert torch.equal(below, again.weight_B == heavy)
    whole = torch.cat((again.weight_B, gate.queue.weight_B))
    assert float(whole.mean()) == pytest.approx(1.0, abs=0.1)


def test_repeats_take_the_chosen_windows_several_times_and_the_rest_never(corpus):
    gate = gate_of(corpus, unit="repeats", repeats=4, keep_fraction=0.25, noise_cut=0.2)
    windows = torch.cat([gate.next(16).tokens for _ in range(4)])
    _, counts = windows.unique(dim=0, return_counts=True)
    assert windows.shape[0] == gate.windows_offered == 64  # the compute of plain training
    assert set((counts % 4).tolist()) == {0}


def test_token_rows_are_of_fixed_number_and_ascending(corpus):
    loss = torch.rand(4, 32)
    for unit in ("token", "token_exact"):
        for signal in ("random", "token_loss"):
            gate = gate_of(corpus, unit=unit, signal=signal, keep_fraction=0.5, noise_cut=0.0)
            gate.next(4)
            plan = gate.plan(0.0, 4, 32)
            assert plan == StepPlan(rows=16, rows_exact=unit == "token_exact")
            rows = gate.choose(View(loss)).rows_SR
            assert rows.shape == (4, 16)
            assert torch.all(rows.diff(dim=1) > 0)


def test_sequences_after_the_forward_are_those_of_the_largest_loss(corpus):
    gate = gate_of(corpus, unit="sequence_after", signal="token_loss", policy="top", keep_fraction=0.5, noise_cut=0.0)
    gate.next(4)
    assert gate.plan(0.0, 4, 32) == StepPlan(sequences=2)
    loss = torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None].expand(4, 32)
    assert gate.choose(View(loss)).sequences_S.tolist() == [1, 3]
    assert gate.uses == {}


def test_bypass_sends_the_surprising_inputs_through_and_never_looks_at_their_targets(corpus):
    gate = gate_of(corpus, unit="bypass", signal="ngram", policy="top", keep_fraction=0.25, noise_cut=0.0)
    batch = gate.next(6)
    plan = gate.plan(0.0, 6, 32)
    twin = gate_of(corpus, unit="bypass", signal="ngram", policy="top", keep_fraction=0.25, noise_cut=0.0)
    places = gate.bypass(batch, plan)
    assert places.shape == (6, 8)
    assert torch.all(places.diff(dim=1) > 0)
    assert torch.all(places[:, 0] == 0)  # the first token, foreseen by nothing
    other = twin.next(6)
    other.tokens[:, -1] = 0  # only ever a target
    assert torch.equal(twin.bypass(other, plan), places)


@pytest.mark.parametrize("signal", ["random", "ngram"])
def test_spans_are_contiguous(corpus, signal):
    gate = gate_of(corpus, unit="bypass", signal=signal, span="span", keep_fraction=0.5, noise_cut=0.0)
    places = gate.bypass(gate.next(8), gate.plan(0.0, 8, 32))
    assert places.shape == (8, 16)
    assert torch.all(places.diff(dim=1) == 1)
    assert int(places.min()) >= 0
    assert int(places.max()) < 32


def test_a_ramp_takes_few_values_in_order_and_ends_at_the_last():
    cfg = GateConfig(
        unit="bypass", signal="random", rate="ramp", rate_from=0.25, keep_fraction=1.0, rate_over=0.6, rate_levels=4
    )
    rate = Rate(cfg)
    seen = [rate.at(i / 100) for i in range(100)]
    assert rate.levels() == [0.25, 0.5, 0.75, 1.0]
    assert seen == sorted(seen)
    assert set(seen) == set(rate.levels())
    assert rate.at(0.59) < 1.0 == rate.at(0.6)


def test_a_compute_budget_is_kept():
    cfg = GateConfig(unit="token", signal="random", keep_fraction=0.25, rate="budget", rate_budget=0.7, rate_levels=4)
    rate = Rate(cfg)
    for _ in range(400):
        keep = rate.at(0.5)
        rate.observe(0.35 + 0.65 * keep)
    assert rate.spent / rate.steps == pytest.approx(0.7, abs=0.01)


def test_every_plan_a_gate_gives_is_announced(corpus):
    for kw in (
        {"unit": "bypass", "signal": "random", "rate": "ramp", "rate_from": 0.25, "keep_fraction": 1.0},
        {"unit": "token", "signal": "token_loss", "keep_fraction": 0.5, "anneal_fraction": 0.3},
        {"unit": "sequence_after", "signal": "gradient_norm", "policy": "top", "keep_fraction": 0.5},
        {"unit": "dw_rows", "signal": "none", "keep_fraction": 1.0, "dw_fraction": 0.25, "anneal_fraction": 0.1},
        {"unit": "subblock", "signal": "none", "keep_fraction": 1.0, "skip_rate": 0.5},
    ):
        gate = gate_of(corpus, **rates(**kw))
        assert {gate.plan(i / 50, 8, 32) for i in range(50)} <= set(gate.plans(8, 32)), kw


def test_dropbp_skips_a_fixed_number_and_spares_the_sensitive(corpus):
    gate = gate_of(corpus, unit="subblock", signal="none", keep_fraction=1.0, noise_cut=0.0, skip_rate=0.5)
    plan = gate.plan(0.0, 8, 32)
    gate.rates = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.01], dtype=torch.float64)
    counts = dict.fromkeys(gate.places, 0)
    for _ in range(400):
        skipped = gate.skip(plan)
        assert len(skipped) == 3
        for place in skipped:
            counts[place] += 1
    assert counts[gate.places[5]] < 20 < 150 < min(counts[p] for p in gate.places[:5])


def test_a_reference_of_another_vocabulary_is_refused(corpus, tmp_path):
    from dataclasses import asdict

    from sparse_update.loop.checkpoint import save_checkpoint
    from sparse_update.signals import SignalError

    other = Transformer(ModelConfig(width=16, layers=1, heads=2, context=32, vocab_size=99, attention="explicit"))
    save_checkpoint(tmp_path / "c", dict(other.state_dict()), {}, {"model": asdict(other.cfg), "step": 0})
    cfg = GateConfig(unit="sequence", signal="excess", policy="top", keep_fraction=0.5)
    stream = WindowStream(corpus, 32, seed=0)
    with pytest.raises(SignalError, match="vocabulary of 99"):
        make_gate(cfg, stream, GateContext(256, 32, 0, model=other, reference=str(tmp_path / "c")))
    with pytest.raises(SignalError, match="reference"):
        make_gate(cfg, stream, GateContext(256, 32, 0, model=other))


def test_plugins_register_before_the_settings_are_checked(tmp_path, monkeypatch):
    (tmp_path / "my_policies.py").write_text(
        "from sparse_update.gates.policies import register_policy, band\n"
        "@register_policy('mine_from_a_module')\n"
        "def select(score, keep_fraction, generator, progress):\n"
        "    return band(-score, keep_fraction, 0.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kw = {"unit": "sequence", "signal": "ngram", "policy": "mine_from_a_module", "keep_fraction": 0.5}
    with pytest.raises(ValueError, match="is not known"):
        GateConfig(**kw)
    assert GateConfig(**kw, plugins=["my_policies"]).policy == "mine_from_a_module"
    sys.modules.pop("my_policies")
    with pytest.raises(ValueError, match="no_such_module"):
        GateConfig(plugins=["no_such_module"])


@pytest.mark.parametrize(
    ("kw", "word"),
    [
        ({"unit": "bypass", "signal": "token_loss", "keep_fraction": 0.5}, "before the forward"),
        ({"unit": "token", "signal": "stale_loss", "keep_fraction": 0.5}, "scores whole windows"),
        ({"unit": "sequence", "signal": "fisher", "keep_fraction": 0.5}, "ranks weights"),
        ({"unit": "sequence", "signal": "surprize", "keep_fraction": 0.5}, "cannot gate unit 'sequence'"),
        ({"unit": "sequence", "signal": "ngram", "signal_options": {"bit": 3}}, "signal ngram takes orders"),
        ({"unit": "token", "signal": "token_loss", "policy": "cdf", "keep_fraction": 0.5}, "static"),
        ({"unit": "word"}, "sequence"),
        ({"unit": "token", "signal": "random", "keep_fraction": 0.0}, r"\(0, 1\]"),
        ({"unit": "token", "signal": "random", "keep_fraction": 1.2}, r"\(0, 1\]"),
        ({"unit": "token", "signal": "random", "keep_fraction": float("nan")}, r"\(0, 1\]"),
        ({"unit": "token", "signal": "token_loss", "keep_fraction": 0.8, "noise_cut": 0.3}, "noise_cut"),
        ({"unit": "token", "signal": "random", "replay_fraction": 1.0}, "replay_fraction"),
        ({"unit": "token", "signal": "random", "anneal_fraction": -0.1}, "anneal_fraction"),
        ({"unit": "token", "signal": "random", "rate": "linear"}, "gate.rate"),
        ({"unit": "token", "signal": "random", "rate": "ramp", "rate_levels": 1}, "rate_levels"),
        ({"unit": "token", "signal": "random", "rate_budget": 2.0}, "rate_budget"),
        ({"unit": "bypass", "signal": "random", "span": "double"}, "gate.span"),
        ({"unit": "dw_rows"}, "dw_fraction"),
        ({"unit": "dw_rows", "dw_fraction": 1.5}, "dw_fraction"),
        ({"unit": "subblock"}, "skip_rate"),
        ({"unit": "gradient", "vcas_tau": 0.0}, "vcas_tau"),
        ({"unit": "gradient", "vcas_repetitions": 1}, "vcas_repetitions"),
        ({"unit": "repeats", "signal": "ngram", "keep_fraction": 0.5}, "gate.repeats"),
        ({"repeats": 3}, "gate.repeats"),
        ({"signal": "ngram"}, "cannot gate unit 'none'"),
        ({"keep_fraction": 0.5}, "gate.unit"),
        ({"unit": "sequence", "signal": "ngram", "pool_windows": 1}, "pool"),
    ],
)
def test_bad_gates_are_refused(kw, word):
    with pytest.raises(ValueError, match=word):
        GateConfig(**kw)


def test_a_model_that_a_gate_does_not_fit_is_named(corpus):
    with pytest.raises(ValueError, match=r"gate\.skip_rate = 0.01: of 6 sub-blocks that is 0"):
        gate_of(corpus, unit="subblock", signal="none", keep_fraction=1.0, noise_cut=0.0, skip_rate=0.01)


def test_a_gate_of_ones_own_needs_only_what_differs(corpus):
    class Halving(Gate):
        def plan(self, progress, windows, length):
            return StepPlan(rows=length // 2)

    gate = Halving(GateConfig(), WindowStream(corpus, 32, seed=0), GateContext(256, 32, 0))
    assert gate.next(4).tokens.shape == (4, 33)
    assert gate.plan(0.0, 4, 32).rows == 16


def test_a_distance_of_gradients_is_summed_in_their_own_order():
    """In the order of a set, which Python draws anew in every process, a run would not resume to the same bits."""
    names = [f"blocks.{i}.attn.q.weight" for i in range(40)]
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp() * 10.0 ** torch.arange(
        40
    )
    gradients = {name: (value[None],) for name, value in zip(names, values, strict=True)}
    expected = 0.0
    for value in values:
        expected += float(value.square())
    assert distance(gradients, {}) == distance({}, gradients) == expected
    missing = dict(list(gradients.items())[:30])
    assert distance(missing, gradients) == sum(float(value.square()) for value in values[30:])
