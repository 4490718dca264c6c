"""Batches that grow over a run: against a loop by hand, the shipped prices, the order of the windows, and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_update.clock.cost import Step
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.schedules import check_shapes
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import StepPlan
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig, schedule
from tests.sparse_update.growth.schedules import BATCH, SHAPE, build, resumes_to_the_bit, windows_shown, write_text

RISING = "2@0.2,4@0.5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def size_at(progress):
    return 2 if progress < 0.2 else 4 if progress < 0.5 else BATCH


def test_a_run_is_a_plain_loop_with_batches_and_rates_of_the_schedule(corpus, tmp_path):
    trainer, reports = build(corpus, tmp_path, batch_schedule=RISING)
    result = trainer.run()
    torch.manual_seed(0)
    model, table = Transformer(ModelConfig(**SHAPE)), shipped_table()
    cfg, stream, limit = OptimConfig(), WindowStream(corpus, 16, seed=0), trainer.budget.cfg.budget_reference_s
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    spent, tokens, flops, count = 0.0, 0, 0, 0
    while True:
        progress = spent / limit
        size = size_at(progress)
        seconds = sum(table.step_s(model.cfg, cfg, Step(StepPlan(), None, size, 16), "eager").values())
        if spent + seconds > limit:
            break
        text = stream.take(size).tokens
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(progress, cfg) * (size / BATCH) ** 0.5
        optimizer.step()
        assert reports[count].loss_nats == pytest.approx(float(loss.detach()), abs=2e-5), count
        spent, count = spent + seconds, count + 1
        tokens, flops = tokens + size * 16, flops + plan_flops(model.cfg, size).total
    assert (result.step, result.tokens, result.flops) == (count, tokens, flops)
    assert result.reference_s == pytest.approx(spent, rel=1e-9)
    for (name, ours), plain in zip(trainer.updates.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=2e-4), name
    last = reports[0]  # taken after the first step: its factor is the next step's
    following = last.reference_s / limit
    assert last.learning_rate_factor == pytest.approx(schedule(following, cfg) * (size_at(following) / BATCH) ** 0.5)


@pytest.mark.parametrize("batches", [RISING, "12@0.3,3@0.6"])
def test_windows_and_their_order_are_those_of_every_other_run(corpus, tmp_path, batches):
    scheduled, _ = build(corpus, tmp_path / "s", batch_schedule=batches)
    plain, _ = build(corpus, tmp_path / "p")
    seen, expected = windows_shown(scheduled), windows_shown(plain)
    scheduled.run(), plain.run()
    ours, theirs = (list(itertools.chain(*found)) for found in (seen, expected))
    shared = min(len(ours), len(theirs))
    assert shared > 100
    assert ours[:shared] == theirs[:shared]
    assert {len(step) for step in seen} == {BATCH, *(int(part.split("@")[0]) for part in batches.split(","))}


def test_a_budget_of_offered_tokens_reads_the_same_text(corpus, tmp_path):
    found = []
    for name, given_ in (("s", {"batch_schedule": RISING}), ("p", {})):
        trainer, _ = build(corpus, tmp_path / name, budget_offered_tokens=16 * 200, **given_)
        seen = windows_shown(trainer)
        trainer.run()
        found.append(list(itertools.chain(*seen)))
    assert abs(len(found[0]) - 200) < BATCH
    assert found[0][:200] == found[1][:200]


def test_batches_of_one_size_are_plain_training_to_the_bit(corpus, tmp_path):
    one, reports = build(corpus, tmp_path / "one", batch_schedule=f"{BATCH}@0.5")
    plain, plain_reports = build(corpus, tmp_path / "plain")
    assert one.run().val_loss_nats == plain.run().val_loss_nats
    assert [r.loss_nats for r in reports] == [r.loss_nats for r in plain_reports]


WITH = {
    "alone": {},
    "muon": {"optim": OptimConfig(name="muon", schedule="wsd"), "batch_rate_power": 0.0},
    "masked": {"optim": OptimConfig(mask=MaskConfig(kind="agreement"))},
    "band": {"gate": GateConfig(unit="sequence", signal="ngram", keep_fraction=0.75, pool_windows=16, ngram_bits=12)},
    "steered": {
        "gate": GateConfig(
            unit="sequence", signal="random", keep_fraction=0.5, pool_windows=16, rate="budget", rate_budget=0.9
        )
    },
    "lengths": {"length_schedule": "8@0.4"},
    "bags": {"bags": "2@0.4"},
    "pieces": {"accumulate": 2},
    "growing": {"growth": GrowthConfig("depth", "depth", start_layers=1, until=0.4)},
}


@pytest.mark.parametrize("stop", [3, 7, 14], ids=["before", "at", "after"])
@pytest.mark.parametrize("name", WITH)
def test_an_interrupted_run_resumes_to_the_bit(corpus, tmp_path, name, stop):
    resumes_to_the_bit(corpus, tmp_path, stop, batch_schedule=RISING, **WITH[name])


def test_each_size_is_compiled_once_with_static_shapes(corpus, tmp_path, monkeypatch):
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile_(model, backend=counter, fullgraph=True, **kw))
    torch._dynamo.reset()
    trainer, reports = build(corpus, tmp_path / "c", batch_schedule=RISING, compiled=True)
    trainer.run()
    assert counter.frame_count == 3
    shapes = [tuple(n.meta["example_value"].shape) for g in counter.graphs for n in g.graph.nodes if n.op == "placeholder"]
    assert {shape[0] for shape in shapes if len(shape) == 2 and shape[1] == 16} >= {2, 4, BATCH}
    assert all(isinstance(side, int) for shape in shapes for side in shape)  # no symbols
    eager, eager_reports = build(corpus, tmp_path / "e", batch_schedule=RISING)
    eager.run()
    assert [r.loss_nats for r in reports] == pytest.approx([r.loss_nats for r in eager_reports], abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.floats(0, 1))
def test_the_rate_follows_the_size_of_the_batch(small, full, power):
    cfg = TrainerConfig(batch_windows=full, batch_schedule=f"{small}@0.5", batch_rate_power=power)
    assert cfg.rate_at(0.5) == cfg.rate_at(1.0) == 1.0
    assert cfg.rate_at(0.0) ** 2 == pytest.approx((small / full) ** (2 * power))


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"batch_schedule": "4"}, "is not WINDOWS@SHARE"),
        ({"batch_schedule": "4@0.5,2@0.4"}, "shares rising"),
        ({"batch_schedule": "0@0.5"}, "from 1 on"),
        ({"batch_schedule": RISING, "batch_rate_power": 1.5}, r"must lie in \[0, 1\]"),
        ({"batch_schedule": RISING, "gate": GateConfig(unit="auto")}, "batches of one size"),
        ({"batch_schedule": RISING, "gate": GateConfig(unit="token", signal="token_loss", keep_fraction=0.5)}, "one size"),
        ({"batch_schedule": "3@0.5", "accumulate": 2}, "3 windows"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(corpus, tmp_path, given_, words):
    with pytest.raises(ValueError, match=words):
        build(corpus, tmp_path, **given_)


def test_more_shapes_than_torch_compiles_are_refused(corpus, tmp_path, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile_(model, backend="eager", **kw))
    many = ",".join(f"{n}@{n / 10:g}" for n in range(1, 8))
    assert many.count("@") == 7
    build(corpus, tmp_path, compiled=True, batch_schedule=many)  # eight shapes with the last
    with pytest.raises(ValueError, match=r"9 shapes.*compile=off"):
        build(corpus, tmp_path, compiled=True, batch_schedule=f"{many},9@0.75")
    build(corpus, tmp_path, batch_schedule=f"{many},9@0.75")
    check_shapes([Step(StepPlan(), None, n, 16) for n in range(8)])
