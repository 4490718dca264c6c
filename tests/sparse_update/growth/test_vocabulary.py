"""A vocabulary that is predicted in an order: against autograd on the whole head, torch's counter, and loops by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.clock.cost import Step
from sparse_update.clock.shipped import shipped_table
from sparse_update.clock.timing import Setting, step_probe
from sparse_update.data.stream import WindowStream
from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig
from sparse_update.growth.vocabulary import make_vocabulary, partial_logits, partial_loss
from sparse_update.objectives.likelihood import Likelihood
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import StepPlan
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig, schedule
from sparse_update.weights.subset import SubsetConfig
from tests.sparse_update.growth.schedules import BATCH, CPU, SHAPE, build, resumes_to_the_bit, write_text

PARTS = "4@0.2,8@0.5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


# the order


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=200), st.integers(0, 5))
def test_the_commonest_come_first_and_shares_are_those_of_the_text(tokens, seed):
    text, count = np.array(tokens, dtype=np.uint16), Counter(tokens)
    frequent = make_vocabulary(text, 20, "frequent", seed)
    assert frequent.order_V.tolist() == sorted(range(20), key=lambda t: (-count[t], t))
    random = make_vocabulary(text, 20, "random", seed)
    for found in (frequent, random):
        assert sorted(found.order_V.tolist()) == list(range(20))
        for k in (1, 3, 20):
            first = set(found.order_V[:k].tolist())
            assert found.share(k) == pytest.approx(sum(t in first for t in tokens) / len(tokens))
            assert found.first(k).tolist() == sorted(first)
            places = found.places(k).tolist()
            assert [places[t] for t in sorted(first)] == list(range(k))
            assert all(places[t] == -100 for t in set(range(20)) - first)
    assert random.share(1) > 0  # tokens that the text lacks are last


def test_another_seed_draws_another_order():
    text = np.arange(50, dtype=np.uint16)
    orders = {tuple(make_vocabulary(text, 50, "random", seed).order_V.tolist()) for seed in range(5)}
    assert len(orders) == 5
    assert len({tuple(make_vocabulary(text, 50, "frequent", seed).order_V.tolist()) for seed in range(5)}) == 1


# the step


@pytest.mark.parametrize("tied", [False, True])
def test_its_gradient_is_that_of_the_whole_head_with_the_other_logits_at_minus_infinity(tied):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SHAPE, "tie_embeddings": tied})).double()
    torch.nn.init.normal_(model.blocks[0].attn.o.weight)
    text = torch.randint(0, 256, (3, 17))
    vocabulary = make_vocabulary(torch.randint(0, 256, (999,)).numpy(), 256, "frequent", 0)
    kept = vocabulary.first(60)
    lost = partial_loss(partial_logits(model, text[:, :-1], kept), vocabulary.places(60)[text[:, 1:]], vocabulary.share(60))
    ours = torch.autograd.grad(lost.mean(), list(model.parameters()))
    outside = torch.ones(256, dtype=torch.bool)
    outside[kept] = False
    logp = model(text[:, :-1]).masked_fill(outside, -torch.inf).log_softmax(-1)
    there = ~outside[text[:, 1:]]
    picked = logp.gather(-1, text[:, 1:, None])[..., 0][there]
    theirs = torch.autograd.grad(-picked.sum() / vocabulary.share(60) / 48, list(model.parameters()))
    assert 0 < there.sum() < 48
    assert torch.equal(lost == 0, ~there)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("count", [16, 100])
def test_flops_of_a_step_are_what_torch_counts(count):
    cfg = ModelConfig(**SHAPE)
    model, text = Transformer(cfg), torch.randint(0, 256, (4, 17))
    with FlopCounterMode(display=False) as counter:
        places = (text[:, 1:] % count).contiguous()
        partial_loss(partial_logits(model, text[:, :-1], torch.arange(count)), places, 1.0).mean().backward()
    counted = plan_flops(cfg, 4, StepPlan(vocabulary=count)).total
    assert counted == counter.get_total_flops()
    assert plan_flops(cfg, 4).total - counted == 3 * 2 * 64 * cfg.width * (256 - count)


def test_the_shipped_table_prices_them_and_charges_for_the_gathers():
    cfg, optim, table = ModelConfig(**{**SHAPE, "vocab_size": 2048, "width": 64}), OptimConfig(), shipped_table()

    def seconds(count):
        plan = StepPlan(vocabulary=count)
        return sum(table.step_s(cfg, optim, Step(plan, None, 16, 16), "eager").values())

    assert seconds(128) < seconds(1024) < seconds(2047)
    assert seconds(2047) > seconds(0)  # the other row saves less than gathering all of them takes


def test_where_times_are_measured_they_are_too():
    cfg = ModelConfig(**SHAPE)
    setting = Setting(cfg, OptimConfig(), CPU, "explicit", "fp32")
    found = step_probe(setting, Step(StepPlan(vocabulary=9), None, 2, 16), "key")()
    assert list(found) == ["key"]
    assert found["key"] > 0


@pytest.mark.parametrize("kw", [{"vocabulary": -1}, {"vocabulary": 4, "rows": 4}, {"vocabulary": 4, "bag": 2}])
def test_a_plan_that_predicts_a_part_leaves_nothing_else_out(kw):
    with pytest.raises(ValueError, match=r"plan\.(vocabulary|bag)"):
        StepPlan(**kw)


# a run


def test_a_run_is_a_plain_loop_on_the_first_tokens_and_then_on_all(corpus, tmp_path):
    trainer, reports = build(corpus, tmp_path, vocabulary=PARTS)
    result = trainer.run()
    torch.manual_seed(0)
    model, table = Transformer(ModelConfig(**SHAPE)), shipped_table()
    common = [t for t, _ in Counter(corpus.train_tokens.tolist()).most_common()]
    cfg, stream, limit = OptimConfig(), WindowStream(corpus, 16, seed=0), trainer.budget.cfg.budget_reference_s
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
    spent, flops = 0.0, 0
    for count in range(result.step):
        progress = spent / limit
        size = 4 if progress < 0.2 else 8 if progress < 0.5 else 0
        plan = StepPlan(vocabulary=size)
        text = stream.take(BATCH).tokens
        logits, target = model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()
        if size:
            inside = torch.zeros(256, dtype=torch.bool)
            inside[common[:size]] = True
            share = float(np.isin(corpus.train_tokens, common[:size]).mean())
            logits = logits.masked_fill(~inside, -torch.inf)
            there = inside[target]
            loss = F.cross_entropy(logits[there], target[there], reduction="sum") / len(target) / share
        else:
            loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(progress, cfg)
        optimizer.step()
        assert reports[count].loss_nats == pytest.approx(float(loss.detach()), abs=2e-5), count
        spent += sum(table.step_s(model.cfg, cfg, Step(plan, None, BATCH, 16), "eager").values())
        flops += plan_flops(model.cfg, BATCH, plan).total
    assert (result.tokens, result.flops) == (result.step * BATCH * 16, flops)
    assert result.reference_s == pytest.approx(spent, rel=1e-9)
    assert result.step > 15
    for (name, ours), plain in zip(trainer.updates.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=2e-4), name


WITH = {
    "alone": {},
    "random": {"vocabulary_order": "random"},
    "tied": {"shape": {"tie_embeddings": True}},
    "muon": {"optim": OptimConfig(name="muon", schedule="wsd", mask=MaskConfig(kind="surprise"))},
    "band": {"gate": GateConfig(unit="sequence", signal="ngram", keep_fraction=0.75, pool_windows=16, ngram_bits=12)},
    "lengths": {"length_schedule": "8@0.4"},
    "batches": {"batch_schedule": "4@0.4"},
    "growing": {"growth": GrowthConfig("depth", "depth", start_layers=1, until=0.4)},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("stop", [3, 7, 12], ids=["before", "at", "after"])
@pytest.mark.parametrize("name", WITH)
def test_an_interrupted_run_resumes_to_the_bit(corpus, tmp_path, name, stop):
    resumes_to_the_bit(corpus, tmp_path, stop, vocabulary=PARTS, **WITH[name])


@pytest.mark.parametrize("other", [{"vocabulary": ""}, {"vocabulary_order": "random"}])
def test_a_run_does_not_go_on_with_another_order(corpus, tmp_path, other):
    first, _ = build(corpus, tmp_path, vocabulary=PARTS)
    first.checkpoints.save()
    again, _ = build(corpus, tmp_path, **{"vocabulary": PARTS, **other})
    with pytest.raises(ValueError, match="vocabulary"):
        again.resume(tmp_path / "checkpoint")


def test_a_plain_run_does_not_become_one_with_an_order(corpus, tmp_path):
    first, _ = build(corpus, tmp_path)
    first.checkpoints.save()
    again, _ = build(corpus, tmp_path, vocabulary=PARTS)
    with pytest.raises(ValueError, match=r"without trainer\.vocabulary"):
        again.resume(tmp_path / "checkpoint")


def test_pieces_add_up_to_the_whole_batch(corpus, tmp_path):
    whole, reports = build(corpus, tmp_path / "w", vocabulary=PARTS)
    pieces, pieces_reports = build(corpus, tmp_path / "p", vocabulary=PARTS, accumulate=4)
    whole.run(), pieces.run()
    assert [r.loss_nats for r in pieces_reports] == pytest.approx([r.loss_nats for r in reports], abs=1e-4)


def test_each_part_is_compiled_once_with_static_shapes(corpus, tmp_path, monkeypatch):
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile_(model, backend=counter, fullgraph=True, **kw))
    torch._dynamo.reset()
    trainer, reports = build(corpus, tmp_path / "c", vocabulary=PARTS, compiled=True)
    trainer.run()
    assert counter.frame_count == 3
    eager, eager_reports = build(corpus, tmp_path / "e", vocabulary=PARTS)
    eager.run()
    assert [r.loss_nats for r in reports] == pytest.approx([r.loss_nats for r in eager_reports], abs=1e-6)


class Other(Likelihood):
    predicts_parts = False


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"vocabulary": "4"}, "is not TOKENS@SHARE"),
        ({"vocabulary": "256@0.5"}, "has 256: take fewer"),
        ({"vocabulary": PARTS, "vocabulary_order": "rare"}, "one of frequent, random"),
        ({"vocabulary": PARTS, "bags": "2@0.2"}, "set one of them"),
        ({"vocabulary": PARTS, "gate": GateConfig(unit="auto")}, "no gate knows"),
        ({"vocabulary": PARTS, "subset": SubsetConfig(kind="layers", active_fraction=0.5)}, "use subset=all"),
        ({"vocabulary": PARTS, "objective": Other}, "Other: it knows no steps"),
        ({"vocabulary": PARTS, "stream": object}, "no corpus whose tokens"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(corpus, tmp_path, given_, words):
    with pytest.raises(ValueError, match=words):
        build(corpus, tmp_path, **given_)


def test_several_processes_are_refused(corpus, tmp_path):
    from sparse_update.loop.records import TrainerConfig
    from sparse_update.loop.schedules import check_partial

    class Two:
        size = 2

    with pytest.raises(ValueError, match="2 processes"):
        check_partial(GateConfig(), SubsetConfig(), TrainerConfig(vocabulary=PARTS), 256, Two())
