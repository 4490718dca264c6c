"""Bags of tokens against plain loops in float64, autograd on a model that takes embeddings, and torch's own counter."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.clock.cost import ComponentTimes, Step, identity
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.records import CorpusError
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig
from sparse_update.growth.superposition import NOTHING, bag_embeddings, bag_loss, bags_of
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.recorder import Listeners
from sparse_update.loop.records import TrainerConfig
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import StepPlan
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import SubsetConfig

MODEL = {"width": 16, "layers": 2, "heads": 2, "context": 16, "vocab_size": 256, "attention": "explicit"}
sizes = st.sampled_from([1, 2, 3, 4, 6, 12])


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_bags_and_what_follows_them_are_those_of_the_text(size, batch, times, seed):
    length = 12 * times
    text = torch.randint(0, 50, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    bags, after = bags_of(text[:, :-1], text[:, 1:], size)
    assert bags.shape == after.shape == (batch, length // size, size)
    for row, line in enumerate(text.tolist()):
        for t in range(length // size):
            assert bags[row, t].tolist() == line[t * size : (t + 1) * size]
            follows = line[(t + 1) * size : (t + 2) * size]
            assert after[row, t].tolist() == follows + [NOTHING] * (size - len(follows))


def test_bags_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="do not tile a sequence of 12"):
        bags_of(torch.zeros(2, 12), torch.zeros(2, 12), 5)


@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(0, 99))
def test_a_bag_goes_in_as_the_mean_of_its_embeddings(size, seed):
    torch.manual_seed(seed)
    embedding = torch.nn.Embedding(20, 5).double()
    text = torch.randint(0, 20, (2, 13))
    bags, _ = bags_of(text[:, :-1], text[:, 1:], size)
    found = bag_embeddings(embedding, bags)
    for row in range(2):
        for t in range(12 // size):
            by_hand = sum(embedding.weight[int(token)] for token in text[row, t * size : (t + 1) * size]) / size
            assert torch.allclose(found[row, t], by_hand, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(0, 99))
def test_the_loss_is_the_mean_surprise_of_the_next_bags_tokens(size, seed):
    """-sum of log softmax over the targets that are there, worked out one by one in float64."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(2, 12 // size, 7))
    text = generator.integers(0, 7, (2, 13))
    _, after = bags_of(torch.from_numpy(text[:, :-1]), torch.from_numpy(text[:, 1:]), size)
    found = bag_loss(torch.from_numpy(logits), after)
    assert found.dtype == torch.float64
    for row in range(2):
        for t in range(12 // size):
            p = np.exp(logits[row, t]) / np.exp(logits[row, t]).sum()
            follows = text[row, (t + 1) * size : (t + 2) * size]
            assert float(found[row, t]) == pytest.approx(-np.mean(np.log(p[follows])), abs=1e-12)
    if size == 1:
        assert torch.allclose(found, token_loss(torch.from_numpy(logits), torch.from_numpy(text[:, 1:])), atol=1e-12)


def test_the_gradient_of_a_bag_loss_is_that_of_a_multi_hot_target():
    """Cross-entropy against probabilities, as torch has it, where every target is there."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 3, 4))
    hot = F.one_hot(targets, 7).double().mean(2)
    theirs = F.cross_entropy(logits.flatten(0, 1), hot.flatten(0, 1))
    ours = bag_loss(logits, targets).mean()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-12)
    a, b = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-12)


def test_the_model_reads_bags_as_it_reads_their_mean_embeddings():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL)).double()
    bags = torch.randint(0, 256, (2, 8, 2))
    x = model.embed.weight[bags].mean(2)
    for block in model.blocks:
        x = block(x, model.cos[:8].double(), model.sin[:8].double())
    assert torch.allclose(model(bags), model.head(model.norm(x)), atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_flops_of_a_step_on_bags_are_what_torch_counts(size):
    cfg = ModelConfig(**MODEL)
    model = Transformer(cfg)
    tokens = torch.randint(0, 256, (4 * size, 17))
    bags, after = bags_of(tokens[:, :-1], tokens[:, 1:], size)
    with FlopCounterMode(display=False) as counter:
        bag_loss(model(bags), after).mean().backward()
    counted = plan_flops(cfg, 4 * size, StepPlan(bag=size), None, 16 // size).total
    assert counted == counter.get_total_flops()
    plain = plan_flops(cfg, 4).total  # the same positions: only attention is shorter
    scores = 3 * 2 * 2 * 2 * 4 * 16 * 16 * 16
    assert plain - counted == scores - scores // size


def test_the_shipped_table_prices_them():
    cfg, optim = ModelConfig(**{**MODEL, "vocab_size": 256}), OptimConfig()
    plain = Step(StepPlan(), None, 8, 8)
    priced = [sum(shipped_table().step_s(cfg, optim, s, "eager").values()) for s in (plain, plain_on_bags(8, 8))]
    assert 0.9 < priced[1] / priced[0] < 1.6


def plain_on_bags(batch, length):
    return Step(StepPlan(bag=2), None, batch, length)


@pytest.mark.parametrize("kw", [{"bag": 0}, {"bag": 2, "rows": 4}, {"bag": 2, "want": frozenset({"entropy"})}])
def test_a_plan_on_bags_leaves_nothing_out(kw):
    with pytest.raises(ValueError, match=r"plan\.bag"):
        StepPlan(**kw)


# a run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(bytes(generator.integers(97, 110, 1500).astype(np.uint8)))
    return load_corpus(DataConfig(name="files", path=str(folder)))


def measured(times, steps, components):
    return times.extended({**{step.key: 10.0 for step in steps}, **dict.fromkeys(components, 0.0)}, 10.0)


def build(corpus, folder, steps=20, gate=None, subset=None, mask=None, growth=None, variant="autograd", **kw):
    """A trainer whose every step costs 10 reference milliseconds; and what it reports."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    ms = {"forward": 4.0, "backward_dx": 3.0, "backward_dw": 2.0, "optimizer": 1.0}
    optim = OptimConfig(mask=mask or MaskConfig())
    compiled = variant.endswith("compiled")
    table = ComponentTimes(ms, {}, "explicit", "fp32", variant, compiled, 4, identity(model.cfg, optim), {})
    reports = []
    trainer = make_trainer(
        model,
        Arm(gate or GateConfig(), subset or SubsetConfig(), optim, growth or GrowthConfig()),
        TrainerConfig(
            **{"budget_reference_s": steps * 0.010 + 1e-6, "batch_windows": 4, "log_every_steps": 1, "evaluations": 2, **kw}
        ),
        Text(WindowStream(corpus, 16, seed=0), {"val": val_windows(corpus, 16, 256)}),
        Prices(table, measured),
        Place(folder),
        0,
        Listeners(reports.append),
    )
    return trainer, reports


def test_a_run_on_bags_is_a_plain_loop_on_bags_and_then_on_tokens(corpus, tmp_path):
    trainer, reports = build(corpus, tmp_path, bags="4@0.1,2@0.3")
    result = trainer.run()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    cfg, stream = OptimConfig(), WindowStream(corpus, 16, seed=0)
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    read = flops = 0
    for step in range(20):
        progress = step * 0.010 / trainer.budget.cfg.budget_reference_s
        size = 4 if progress < 0.1 else 2 if progress < 0.3 else 1
        text = stream.take(4 * size).tokens
        read += 4 * size * 16
        flops += plan_flops(model.cfg, 4 * size, length=16 // size).total
        if size == 1:
            loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        else:
            logits = model(text[:, :-1].reshape(4 * size, -1, size)).log_softmax(-1)
            losses = torch.zeros(4 * size, 16 // size)
            for t in range(16 // size):
                follows = text[:, (t + 1) * size : (t + 2) * size]
                losses[:, t] = -logits[:, t].gather(1, follows).mean(1)
            loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(progress, cfg)
        optimizer.step()
        assert reports[step].loss_nats == pytest.approx(float(loss.detach()), abs=2e-5), step
    for (name, ours), plain in zip(trainer.updates.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=2e-4), name
    assert (result.step, result.tokens, result.flops) == (20, read, flops)
    assert result.windows_offered == read // 16 + 4  # the batch that the budget did not pay for


def test_bags_of_one_token_are_plain_training_to_the_bit(corpus, tmp_path):
    one, reports = build(corpus, tmp_path / "one", bags="1@0.5")
    plain, plain_reports = build(corpus, tmp_path / "plain")
    assert one.run().val_loss_nats == plain.run().val_loss_nats
    assert [r.loss_nats for r in reports] == [r.loss_nats for r in plain_reports]
    for a, b in zip(one.updates.model.parameters(), plain.updates.model.parameters(), strict=True):
        assert torch.equal(a, b)


GATED = {"unit": "sequence", "signal": "ngram", "keep_fraction": 0.75, "pool_windows": 16, "ngram_bits": 12}
SETTINGS = {
    "bags": {},
    "masked": {"mask": MaskConfig(kind="agreement")},
    "gated": {"gate": GateConfig(**GATED, noise_cut=0.125)},
    "random": {"gate": GateConfig(unit="sequence", signal="random", keep_fraction=0.75, pool_windows=16)},
    "weighed": {"gate": GateConfig(**{**GATED, "policy": "importance"})},
    "lengths": {"length_schedule": "8@0.5"},
    "growing": {
        "growth": GrowthConfig(name="depth", kind="depth", start_layers=1, until=0.4),
        "mask": MaskConfig(kind="surprise"),
    },
}


@pytest.mark.parametrize("stop", [3, 6, 9])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_interrupted_before_at_and_after_the_switch_resumes_to_the_bit(corpus, tmp_path, name, stop):
    given_ = {**SETTINGS[name], "bags": "2@0.3"}
    whole, whole_reports = build(corpus, tmp_path / "whole", **given_)
    expected = whole.run()
    cut, cut_reports = build(corpus, tmp_path / "cut", **given_)
    cut.records.listeners.on_report = lambda report: (
        cut_reports.append(report),
        os.kill(os.getpid(), signal.SIGINT) if report.step == stop else None,
    )
    assert cut.run().step == stop
    again, again_reports = build(corpus, tmp_path / "cut", **given_)
    torch.manual_seed(99)
    again.resume(tmp_path / "cut" / "checkpoint")
    found = again.run()
    for key in ("step", "tokens", "flops", "reference_s", "val_loss_nats", "windows_offered"):
        assert getattr(found, key) == getattr(expected, key), key
    assert [r.loss_nats for r in cut_reports + again_reports] == [r.loss_nats for r in whole_reports]
    for a, b in zip(again.updates.model.parameters(), whole.updates.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_stage_is_charged_for_its_own_steps(corpus, tmp_path):
    trainer, _ = build(corpus, tmp_path, bags="2@0.3", length_schedule="8@0.5")
    trainer.run()
    uses = trainer.budget.clock.uses
    assert {key: uses[key] for key in uses} == {
        "step[bag=2|all|b=16|t=4]": 7, "step[plain|all|b=8|t=8]": 4, "dense": 9,
    }  # fmt: skip  # the seventh begins right below 0.3


def test_compiled_bags_train_like_eager_ones(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_eagerly)
    compiled, reports = build(corpus, tmp_path / "c", steps=8, bags="2@0.5", variant="autograd_compiled")
    eager, eager_reports = build(corpus, tmp_path / "e", steps=8, bags="2@0.5")
    compiled.run(), eager.run()
    assert [r.loss_nats for r in reports] == pytest.approx([r.loss_nats for r in eager_reports], abs=1e-6)


_COMPILE = torch.compile


def _compile_eagerly(model, **kw):
    """Traced as always, run without a C++ compiler: an untraceable or a shape that moves would raise."""
    return _COMPILE(model, backend="eager", fullgraph=True, **kw)


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"bags": "3@0.3"}, "do not tile sequences of 16"),
        ({"bags": "8@0.3", "length_schedule": "4@0.1"}, "do not tile sequences of 4"),
        ({"bags": "2"}, "is not SIZE@SHARE"),
        ({"bags": "2@0.5,3@0.4"}, "shares rising"),
        ({"bags": "2@0.3", "gate": GateConfig(unit="token", signal="token_loss", keep_fraction=0.5)}, "no gate knows"),
        ({"bags": "2@0.3", "gate": GateConfig(unit="auto")}, "no gate knows"),
        ({"bags": "2@0.3", "subset": SubsetConfig(kind="layers", active_fraction=0.5)}, "use subset=all"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(corpus, tmp_path, given_, words):
    with pytest.raises(ValueError, match=words):
        build(corpus, tmp_path, **given_)


@pytest.mark.parametrize("by", [{"steps": 250}, {"steps": 200, "gate": SETTINGS["random"]["gate"]}])
def test_a_run_that_would_read_its_text_twice_is_refused(corpus, tmp_path, by):
    windows = WindowStream(corpus, 16, seed=0).windows
    keep = 0.75 if "gate" in by else 1.0
    needed = by["steps"] * 4 * (0.7 + 0.3 * 2) / keep
    assert needed > windows > by["steps"] * 4 * 0.99  # plain training would do
    with pytest.raises(CorpusError, match=f"would read {math.floor(needed) // 100 / 10:.0f}.*some of them twice"):
        build(corpus, tmp_path, bags="2@0.3", **by)
    build(corpus, tmp_path, **by)


def test_a_budget_of_offered_tokens_is_one_pass_whatever_the_bags(corpus, tmp_path):
    trainer, _ = build(corpus, tmp_path, bags="2@0.3", budget_offered_tokens=16 * 200)
    assert trainer.run().windows_offered == pytest.approx(200, abs=8)
    with pytest.raises(CorpusError, match="twice"):
        build(corpus, tmp_path / "more", bags="2@0.3", budget_offered_tokens=16 * 5000)
