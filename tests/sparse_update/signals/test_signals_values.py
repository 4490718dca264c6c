"""Signals against independent things: closed forms, autograd, brute-force counts, exact Jaccard similarity."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_update.data.records import Batch
from sparse_update.loop.checkpoint import save_checkpoint
from sparse_update.signals import SignalContext, SignalError, make_signal
from sparse_update.signals.forward import entropy, last_layer_gradient_norm
from sparse_update.signals.gradients import block_sums, gram_inner, sample_gradients
from sparse_update.signals.novelty import Index, signatures, similarity
from sparse_update.signals.proxies import forward_flops
from sparse_update.transformer import ModelConfig, Transformer, token_loss

SHAPE = {"width": 16, "layers": 2, "heads": 2, "context": 12, "vocab_size": 30, "attention": "explicit"}


def batch_of(tokens, window=None):
    number = torch.arange(len(tokens)) if window is None else torch.as_tensor(window)
    return Batch(torch.as_tensor(tokens), torch.zeros(len(tokens), dtype=torch.int8), number)


def model_of(seed, **changes):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(SHAPE | changes)))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


# out of the forward


def test_entropy_against_torch_distributions_and_closed_form():
    logits = torch.randn(3, 5, 11) * 3
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected)
    torch.testing.assert_close(entropy(torch.zeros(1, 1, 8)), torch.full((1, 1), math.log(8)))


def test_last_layer_norm_is_the_gradient_norm_of_autograd():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, 6, generator=generator), torch.randn(9, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 9, (2, 4), generator=generator)
    found = last_layer_gradient_norm(hidden @ weight.T.detach(), hidden, targets)
    for b in range(2):
        for t in range(4):
            loss = F.cross_entropy((hidden[b, t] @ weight.T)[None], targets[b, t][None])
            (gradient,) = torch.autograd.grad(loss, weight)
            assert found[b, t].item() == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_forward_flops_against_the_counter_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, 12, dtype=torch.int64))
    assert forward_flops(model.cfg, 3) == counter.get_total_flops()


# memory


def test_stale_loss_remembers_the_last_visit_and_progress_the_drop():
    context = SignalContext(30, 12)
    stale, progress = make_signal("stale_loss", context), make_signal("learning_progress", context)
    first, second = batch_of(torch.zeros(3, 13, dtype=torch.int64), [5, 2, -1]), batch_of(torch.zeros(1, 13).long(), [5])
    for signal in (stale, progress):
        signal.observe(first, torch.tensor([[4.0], [2.0], [9.0]]).expand(3, 12), 0.0)
        signal.observe(second, torch.full((1, 12), 1.0), 0.1)
    asked = batch_of(torch.zeros(4, 13).long(), [2, 5, 77, -1])
    assert stale.score(asked).tolist() == [2.0, 1.0, 1.5, 1.5]  # the unknown get the mean of the known
    assert progress.score(asked).tolist() == [3.0, 3.0, 3.0, 3.0]  # 5 fell from 4 to 1, the others are not known
    high = make_signal("stale_loss", context, {"unseen": "high"})
    assert high.score(asked).tolist() == [math.inf] * 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 8, width=32)), min_size=1, max_size=40))
def test_stale_loss_equals_a_dictionary(visits):
    signal, plain = make_signal("stale_loss", SignalContext(30, 12), {"unseen": "high"}), {}
    for number, loss in visits:
        signal.observe(batch_of(torch.zeros(1, 13).long(), [number]), torch.full((1, 12), loss), 0.0)
        plain[number] = loss
    found = signal.score(batch_of(torch.zeros(10, 13).long(), list(range(10))))
    assert found.tolist() == pytest.approx([plain.get(n, math.inf) for n in range(10)], rel=1e-5)


# proxies and references


def test_trained_proxies_learn_a_pattern_that_repeats():
    model, generator = model_of(0), torch.Generator().manual_seed(0)
    context = SignalContext(30, 12, model=model)
    tokens = (torch.randint(0, 30, (64, 1), generator=generator) + torch.arange(13)) % 30  # always the next number
    for name, options in (("tiny", {"width": 16, "train_share": 1.0}), ("early_exit", {"train_share": 1.0, "lr": 0.02})):
        signal, before = make_signal(name, context, options), model.embed.weight.clone()
        first = signal.score(batch_of(tokens)).mean()
        for _ in range(25):
            signal.score(batch_of(tokens))
            signal.observe(batch_of(tokens), torch.zeros(64, 12), 0.0)
        last = signal.score(batch_of(tokens)).mean()
        assert last < first - 0.5, name
        assert torch.equal(model.embed.weight, before)
        assert model.embed.weight.grad is None


def test_early_exit_starts_uniform():
    signal = make_signal("early_exit", SignalContext(30, 12, model=model_of(0)))
    found = signal.score(batch_of(torch.randint(0, 30, (3, 13))))
    torch.testing.assert_close(found, torch.full((3, 12), math.log(30)))


def test_excess_is_the_difference_of_two_losses_before_and_after(tmp_path):
    model, reference = model_of(0), model_of(1)
    save_checkpoint(tmp_path / "r", dict(reference.state_dict()), {}, {"model": SHAPE})
    context = SignalContext(30, 12, model=model, reference=str(tmp_path / "r"))
    batch = batch_of(torch.randint(0, 30, (5, 13)))
    x, y = batch.tokens[:, :-1], batch.tokens[:, 1:]
    own, other = token_loss(model(x), y).detach(), token_loss(reference(x), y).detach()
    torch.testing.assert_close(make_signal("excess", context, {"before": True}).score(batch), own - other)
    view = SimpleNamespace(loss_BT=own, signals={})
    signal = make_signal("excess", context)
    torch.testing.assert_close(signal.read(view, batch), own - other)
    signal.probe(4)()
    assert signal.needs == "forward"


def test_a_reference_of_another_vocabulary_or_context_is_refused(tmp_path):
    for key, value, match in (("vocab_size", 31, "vocabulary of 31"), ("context", 8, "context of 8")):
        shape = SHAPE | {key: value}
        save_checkpoint(tmp_path / key, dict(Transformer(ModelConfig(**shape)).state_dict()), {}, {"model": shape})
        with pytest.raises(SignalError, match=match):
            make_signal("excess", SignalContext(30, 12, model=model_of(0), reference=str(tmp_path / key)))


def test_lagging_copies_follow_only_every_so_often():
    model = model_of(0)
    context = SignalContext(30, 12, model=model)
    lagging = make_signal("lagging", context, {"every_steps": 2, "before": True})
    progress = make_signal("learning_progress", context, {"between": "copies", "every_steps": 2})
    batch = batch_of(torch.randint(0, 30, (4, 13)))
    assert lagging.score(batch).abs().max() == 0
    old = token_loss(model(batch.tokens[:, :-1]), batch.tokens[:, 1:]).detach()
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    new = token_loss(model(batch.tokens[:, :-1]), batch.tokens[:, 1:]).detach()
    view = SimpleNamespace(loss_BT=new, signals={})
    for signal, sign in ((lagging, 1), (progress, -1)):
        signal.observe(batch, new, 0.0)
        found = signal.score(batch) if signal is lagging else signal.read(view, batch)
        torch.testing.assert_close(found, sign * (new - old))
        signal.observe(batch, new, 0.0)
    assert lagging.score(batch).abs().max() == 0
    assert progress.read(view, batch).abs().max() == 0


# novelty


def test_novelty_is_against_the_known_and_the_learnt_never_the_offered():
    generator = torch.Generator().manual_seed(0)
    known, learnt, offered = (torch.randint(0, 30, (8, 13), generator=generator) for _ in range(3))
    signal = make_signal("novelty", SignalContext(30, 12, known_tokens=known.flatten()), {"orders": (1, 2, 4)})
    assert signal.per_window(batch_of(known)).max() < signal.per_window(batch_of(learnt)).min()
    before = signal.per_window(batch_of(offered))
    signal.score(batch_of(offered))
    assert torch.equal(signal.per_window(batch_of(offered)), before)
    signal.observe(batch_of(learnt), torch.zeros(8, 12), 0.0)
    assert signal.per_window(batch_of(learnt)).max() < signal.per_window(batch_of(offered)).min()


def shingles(row, size):
    return {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}


def jaccard(a, b, size=5):
    a, b = shingles(a, size), shingles(b, size)
    return len(a & b) / len(a | b)


def test_minhash_estimates_exact_jaccard_without_bias():
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(0, 30, (300, 129), generator=generator)
    edited = original.clone()
    rows = torch.arange(300)[:, None].expand(-1, 5)
    edited[rows, torch.randint(0, 129, (300, 5), generator=generator)] = 30
    found = similarity(signatures(original, 5, 32), signatures(edited, 5, 32))
    truth = torch.tensor([jaccard(a, b) for a, b in zip(original.tolist(), edited.tolist(), strict=True)])
    assert 0.5 < truth.mean() < 0.9
    assert (found - truth).mean().abs() < 0.015  # standard error about 0.08 / sqrt(300) = 0.005
    assert (found - truth).std() < 0.11
    torch.testing.assert_close(similarity(signatures(original, 5, 32), signatures(original, 5, 32)), torch.ones(300))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=5, max_size=17), st.lists(st.integers(0, 5), min_size=5, max_size=17))
def test_similarity_is_symmetric_bounded_and_one_for_equal_sets(a, b):
    length = min(len(a), len(b))
    pair = torch.tensor([a[:length], b[:length]])
    s = signatures(pair, 3, 16)
    found = similarity(s[0], s[1]).item()
    assert found == similarity(s[1], s[0]).item()
    assert 0 <= found <= 1
    if shingles(a[:length], 3) == shingles(b[:length], 3):
        assert found == 1
    if not shingles(a[:length], 3) & shingles(b[:length], 3):
        assert found == 0


def test_duplicates_find_exact_and_edited_windows_in_the_stream_and_in_one_pool():
    generator = torch.Generator().manual_seed(1)
    fresh = torch.randint(0, 30, (100, 129), generator=generator)
    near = fresh[:20].clone()
    near[:, 40] = 31
    for method, lowest in (("minhash", 0.7), ("exact", 0.0)):
        signal = make_signal("duplicates", SignalContext(32, 128), {"method": method})
        assert signal.score(batch_of(fresh)).max() == 0
        pool = torch.cat((fresh[40:50], near, near[:5]))
        found = signal.score(batch_of(pool))
        assert (found[:10] == 1).all()
        assert (found[10:30] >= lowest).all()
        if method == "exact":
            assert (found[10:30] == 0).all()
        assert (found[30:] == 1).all()  # repeats inside one call


def test_duplicates_forget_beyond_their_capacity():
    windows = torch.randint(0, 30, (40, 129), generator=torch.Generator().manual_seed(1))
    signal = make_signal("duplicates", SignalContext(32, 128), {"capacity": 10, "bits": 12})
    signal.score(batch_of(windows))
    assert signal.index.ring.shape == (10, 32)
    found = signal.index.most_similar(signatures(windows, 5, 32))
    assert (found[:30] < 0.5).all()  # overwritten: their slots lead to other windows, which are compared
    assert (found[30:] == 1).all()


def test_an_index_puts_many_as_it_puts_one_by_one():
    sign = signatures(torch.randint(0, 4, (50, 20), generator=torch.Generator().manual_seed(0)), 3, 8)
    many, single = Index(8, 2, 64, 8, "cpu"), Index(8, 2, 64, 8, "cpu")
    many.put(sign)
    for row in sign:
        single.put(row[None])
    assert torch.equal(many.ring, single.ring)
    fresh = signatures(torch.randint(0, 4, (50, 20), generator=torch.Generator().manual_seed(1)), 3, 8)
    assert torch.equal(many.slots, single.slots)
    assert torch.equal(many.most_similar(fresh), single.most_similar(fresh))


def test_fresh_puts_repeats_below_and_noise_above_text():
    generator = torch.Generator().manual_seed(0)
    step = torch.rand(64, 64, generator=generator).pow(8)
    text = torch.zeros(1200, 65, dtype=torch.int64)
    text[:, 0] = torch.randint(0, 64, (1200,), generator=generator)
    for t in range(64):
        text[:, t + 1] = torch.multinomial(step[text[:, t]], 1, generator=generator)[:, 0]
    edited = text[:100].clone()
    edited[:, 30] = 1
    signal = make_signal("fresh", SignalContext(64, 64), {"bits": 18})
    signal.score(batch_of(text[:1000]))
    found = signal.score(batch_of(torch.cat((text[1000:], edited, torch.randint(0, 64, (50, 65), generator=generator)))))
    new, repeated, noise = found[:200], found[200:300], found[300:]
    assert repeated.max() < new.min()
    assert new.max() < noise.min()


# out of the backward


def test_sample_norms_equal_autograd_one_sample_at_a_time():
    model = model_of(0)
    signal = make_signal("sample_norm", SignalContext(30, 12, model=model))
    tokens = torch.randint(0, 30, (5, 13))
    x, y = tokens[:, :-1], tokens[:, 1:]
    with signal.tap():
        token_loss(model(x), y).sum().backward()
    expected = []
    for i in range(5):
        model.zero_grad()
        token_loss(model(x[i : i + 1]), y[i : i + 1]).sum().backward()
        linear = [m.weight.grad for m in model.modules() if isinstance(m, nn.Linear)]
        expected.append(torch.sqrt(sum(g.square().sum() for g in linear)))
    torch.testing.assert_close(signal.norms(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("length", "width"), [(3, 40), (40, 3)])
def test_inner_products_of_sample_gradients_both_ways(length, width):
    a, b = torch.randn(4, length, width).double(), torch.randn(2, length, width).double()
    g, h = torch.randn(4, length, width + 1).double(), torch.randn(2, length, width + 1).double()
    expected = torch.stack(
        [
            torch.stack([(gi.T @ ai * (hj.T @ bj)).sum() for hj, bj in zip(h, b, strict=True)])
            for gi, ai in zip(g, a, strict=True)
        ]
    )
    torch.testing.assert_close(gram_inner(a, g, b, h), expected)
    torch.testing.assert_close(sample_gradients(a, g)[1], g[1].T @ a[1])


def test_block_energy_and_fisher_are_sums_of_squares():
    gradient = torch.arange(12.0).view(6, 2)
    energy = make_signal("block_energy", SignalContext(30, 12), {"block_rows": 4})
    assert energy.take({"w": gradient})["w"].tolist() == [sum(v * v for v in range(8)), sum(v * v for v in range(8, 12))]
    split = energy.take({"w": (gradient[:4], gradient[4:])})["w"]
    assert split.tolist() == block_sums(gradient**2, 4).tolist()
    fisher = make_signal("fisher", SignalContext(30, 12), {"block_rows": 6, "decay": 0.5})
    found = [fisher.take({"w": torch.full((6, 1), v)})["w"].item() for v in (1.0, 3.0)]
    assert found == pytest.approx([6.0, (0.25 * 6 + 0.5 * 54) / 0.75])
    with pytest.raises(SignalError, match="not finite"):
        fisher.take({"w": torch.tensor([float("nan")])})
