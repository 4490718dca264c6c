"""Every kind of sparse step against torch's autograd on plain module code, float64; FLOPs against torch's counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.step import backprop
from sparse_update.step.backward import Stepper, row_bias
from sparse_update.step.flops import plan_flops
from sparse_update.step.forward import Saved
from sparse_update.step.plan import PLAIN, Chosen, StepPlan
from sparse_update.transformer import ModelConfig, Transformer, rotate
from sparse_update.weights.subset import Active, Part

B, T, V = 4, 10, 19
ATTENTIONS = pytest.mark.parametrize("attention", ["explicit", "sdpa"])


def build(attention="explicit", layers=3):
    torch.manual_seed(3)
    model = Transformer(
        ModelConfig(width=16, layers=layers, heads=2, context=T, vocab_size=V, attention=attention)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def data():
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def pick(sequences, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(T, generator=generator)[:count].sort().values for _ in range(sequences)])


def mask_of(positions):
    return torch.zeros(len(positions), T, dtype=torch.bool).scatter_(1, positions, True)


def plain_block(block, x, cos, sin, keep=None, skip=()):
    """Module code; rows outside `keep` (B, T) count as constants, keys and values too; so do the parts in `skip`."""

    def cut(t, name=None):
        return t if keep is None else torch.where(keep[..., None], t, t.detach())

    attn, n = block.attn, block.norm1(cut(x))
    split = (*x.shape[:2], attn.heads, -1)
    q, k, v = (p(n).view(split).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    q, k = rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double())
    if keep is not None:
        k, v = (torch.where(keep[:, None, :, None], t, t.detach()) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    out = attn.o(mixed)
    x = cut(x) + (out.detach() if "attn" in skip else out)
    out = block.mlp(block.norm2(x))
    return x + (out.detach() if "mlp" in skip else out)


def plain_losses(model, x, y, at=None, middle=(), keys=False, keep=None, skip=frozenset()):
    """Token losses (B, T) by module code; `at`: positions that go through the middle layers."""
    cos, sin = model.cos[: x.shape[1]], model.sin[: x.shape[1]]
    h = model.embed(x)
    for index, block in enumerate(model.blocks):
        skipped = {part for layer, part in skip if layer == index}
        if at is None or index not in middle:
            h = plain_block(block, h, cos, sin, keep, skipped)
        elif keys:
            h = torch.where(mask_of(at)[..., None], plain_block(block, h, cos, sin), h)
        else:
            inner = at[..., None].expand(-1, -1, h.shape[-1])
            kept = None if keep is None else keep.gather(1, at)
            h = h.scatter(
                1, inner, plain_block(block, h.gather(1, inner), cos[at][:, None], sin[at][:, None], kept, skipped)
            )
    if keep is not None:
        h = torch.where(keep[..., None], h, h.detach())
    return F.cross_entropy(model.head(model.norm(h)).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def assert_equal(model, step, loss):
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        if gradient is None:
            assert name not in step.gradients, name
        else:
            torch.testing.assert_close(
                step.gradients[name][0], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@ATTENTIONS
@pytest.mark.parametrize("weighted", [False, True])
def test_kept_sequences_equal_the_loss_over_them(attention, weighted):
    model = build(attention)
    x, y = data()
    kept = torch.tensor([0, 3])
    weight = torch.tensor([1.5, 0.25], dtype=torch.float64) if weighted else None
    step = Stepper(model).step(x, y, StepPlan(sequences=2), choose=lambda _: Chosen(kept, weight=weight))
    losses = plain_losses(model, x, y)[kept]
    loss = (losses * weight[:, None]).sum() / (B * T) if weighted else losses.mean()
    assert_equal(model, step, loss)


@ATTENTIONS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sequences", [0, 2])
def test_exact_rows_equal_the_masked_loss(attention, weighted, sequences):
    model = build(attention)
    x, y = data()
    chosen = torch.tensor([1, 2]) if sequences else None
    rows = pick(sequences or B, 4)
    weight = torch.rand(rows.shape, dtype=torch.float64) if weighted else None
    plan = StepPlan(sequences=sequences, rows=4, rows_exact=True)
    step = Stepper(model).step(x, y, plan, choose=lambda _: Chosen(chosen, rows, weight))
    losses = plain_losses(model, x, y)
    losses = (losses if chosen is None else losses[chosen]).gather(1, rows)
    assert_equal(model, step, (losses * weight).sum() / (B * T) if weighted else losses.mean())


@ATTENTIONS
def test_compact_rows_of_kept_sequences_and_sequence_weights(attention):
    model = build(attention)
    x, y = data()
    kept, rows = torch.tensor([0, 2]), pick(2, 5)
    weight_B = torch.tensor([0.5, 9.0, 2.0, 9.0], dtype=torch.float64)
    plan = StepPlan(sequences=2, rows=5)
    step = Stepper(model).step(x, y, plan, choose=lambda _: Chosen(kept, rows), weight_B=weight_B)
    keep = torch.zeros(B, T, dtype=torch.bool)
    keep[kept] = mask_of(rows)
    losses = plain_losses(model, x, y, keep=keep) * weight_B[:, None]
    assert_equal(model, step, losses[keep].sum() / (B * T))


@ATTENTIONS
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("span", [False, True])
def test_tokens_that_pass_the_middle_layers_by(attention, keys, span):
    model = build(attention, layers=4)
    x, y = data()
    at = torch.arange(3, 8).expand(B, 5) if span else pick(B, 5)
    plan = StepPlan(bypass=5, bypass_keys=keys)
    step = Stepper(model).step(x, y, plan, bypass_BR=at)
    losses = plain_losses(model, x, y, at, (1, 2), keys)
    torch.testing.assert_close(step.loss_BT, losses.detach())
    assert_equal(model, step, losses.mean())


@pytest.mark.parametrize("keys", [False, True])
def test_bypass_with_kept_sequences_and_exact_rows(keys):
    model = build()
    x, y = data()
    at, rows, kept = pick(B, 6), pick(2, 4, seed=5), torch.tensor([1, 3])
    plan = StepPlan(bypass=6, bypass_keys=keys, sequences=2, rows=4, rows_exact=True)
    step = Stepper(model).step(x, y, plan, choose=lambda _: Chosen(kept, rows), bypass_BR=at)
    assert_equal(model, step, plain_losses(model, x, y, at, (1,), keys)[kept].gather(1, rows).mean())


@ATTENTIONS
@pytest.mark.parametrize("count", [3, 7])
def test_bypass_with_compact_rows(attention, count):
    model = build(attention)
    x, y = data()
    at, rows = pick(B, 6), pick(B, count, seed=5)
    step = Stepper(model).step(x, y, StepPlan(bypass=6, rows=count), choose=lambda _: Chosen(rows_SR=rows), bypass_BR=at)
    keep = mask_of(rows)
    assert_equal(model, step, plain_losses(model, x, y, at, (1,), keep=keep)[keep].mean())


def test_each_middle_layer_may_have_its_own_tokens():
    model = build(layers=4)
    x, y = data()
    one = pick(B, 5)
    same, other = torch.stack([one, one]), torch.stack([one, pick(B, 5, seed=9)])
    plan = StepPlan(bypass=5)
    steps = [Stepper(model).step(x, y, plan, bypass_BR=at) for at in (one, same, other)]
    for name, (gradient,) in steps[0].gradients.items():
        torch.testing.assert_close(gradient, steps[1].gradients[name][0])
    assert not torch.equal(steps[0].loss_BT, steps[2].loss_BT)


@ATTENTIONS
def test_skipped_sub_blocks_count_as_constants(attention):
    model = build(attention)
    x, y = data()
    skip = frozenset({(0, "attn"), (2, "mlp"), (2, "attn"), (1, "mlp")})
    step = Stepper(model).step(x, y, StepPlan(skip_rate=0.5), skip=skip)
    assert_equal(model, step, plain_losses(model, x, y, skip=skip).mean())


def test_skips_below_exact_rows():
    model = build()
    x, y = data()
    rows, skip = pick(B, 4), frozenset({(2, "attn"), (0, "mlp")})
    plan = StepPlan(rows=4, rows_exact=True, skip_rate=0.3)
    step = Stepper(model).step(x, y, plan, choose=lambda _: Chosen(rows_SR=rows), skip=skip)
    assert_equal(model, step, plain_losses(model, x, y, skip=skip).gather(1, rows).mean())


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan(dw_rows=0.3),
        StepPlan(sample=(0.5, 0.75)),
        StepPlan(sample=(0.5, 0.75), dw_rows=0.4),
        StepPlan(rows=6, rows_exact=True, sample=(0.5, 0.75), dw_rows=0.5),
    ],
    ids=lambda p: p.key,
)
def test_unbiased_kinds_have_the_dense_gradient_as_their_mean(plan):
    """Mean over draws of random projections of each gradient, within 4.5 standard errors."""
    model = build(layers=2)
    x, y = data()
    rows = pick(B, plan.rows) if plan.rows else None

    def chooser(_):
        return Chosen(rows_SR=rows)

    generator = torch.Generator().manual_seed(7)
    stepper = Stepper(model)
    exact = stepper.step(x, y, StepPlan(rows=plan.rows, rows_exact=plan.rows_exact), choose=chooser).gradients
    directions = {n: torch.randn(3, g.numel(), dtype=torch.float64, generator=generator) for n, (g,) in exact.items()}
    draws: dict[str, list[torch.Tensor]] = {n: [] for n in exact}
    for _ in range(120):
        for name, (g,) in stepper.step(x, y, plan, choose=chooser, generator=generator).gradients.items():
            draws[name].append(directions[name] @ g.flatten())
    moved = 0
    for name, values in draws.items():
        sample = torch.stack(values)
        error = sample.std(0) / len(values) ** 0.5
        away = (sample.mean(0) - directions[name] @ exact[name][0].flatten()).abs()
        assert (away <= 4.5 * error + 1e-12).all(), (name, away / error)
        moved += int((error > 1e-9).any())
    assert moved >= 8  # the draws do differ


def test_norms_of_what_enters_each_block():
    model = build()
    x, y = data()
    step = Stepper(model).step(x, y, StepPlan(want=frozenset({"block_norms"})))
    h = model.embed(x)
    outs = []
    for block in model.blocks:
        h = plain_block(block, h, model.cos, model.sin)
        h.retain_grad()
        outs.append(h)
    F.cross_entropy(model.head(model.norm(h)).flatten(0, 1), y.flatten()).backward()
    expected = torch.stack([out.grad.flatten(1).norm(dim=1) for out in outs])
    torch.testing.assert_close(step.norms_LS, expected)
    sampled = Stepper(model).step(x, y, StepPlan(sample=(0.25, 0.5, 0.5)))
    assert [(n > 0).sum().item() for n in sampled.norms_LS] == [2, 2, 4]


def test_signals_of_the_forward():
    model = build()
    x, y = data()
    view = Stepper(model).view(x, y, frozenset({"entropy", "gradient_norm", "update"}))
    hidden = model.hidden(x)
    p = torch.softmax(model.head(hidden), -1)
    torch.testing.assert_close(view.signals["entropy"], -(p * p.log()).sum(-1).detach())
    error = p - F.one_hot(y, V)
    torch.testing.assert_close(view.signals["gradient_norm"], (error.norm(dim=-1) * hidden.norm(dim=-1)).detach())
    one = torch.autograd.grad(
        F.cross_entropy(model.head(model.hidden(x[:1]))[0, 3][None], y[0, 3][None]), model.head.weight
    )[0]
    torch.testing.assert_close(view.signals["gradient_norm"][0, 3], one.norm())
    before = model.embed(x)
    after = plain_block(model.blocks[0], before, model.cos, model.sin)
    torch.testing.assert_close(view.signals["update"][0], ((after - before).norm(dim=-1) / before.norm(dim=-1)).detach())
    assert view.signals["update"].shape == (3, B, T)


def test_the_bias_of_compact_rows_is_in_view():
    model = build()
    x, y = data()
    bias = row_bias(model, x, y, pick(B, 5))
    assert set(bias) == {"embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"}
    assert bias["head"] == pytest.approx(1.0)
    assert bias["norm"] == pytest.approx(1.0)
    assert all(-1 <= value <= 1 for value in bias.values())
    assert bias["blocks.0"] < 0.9999
    everything = row_bias(model, x, y, torch.arange(T).expand(B, T))
    assert all(value == pytest.approx(1.0) for value in everything.values())


PLANS = [
    PLAIN,
    StepPlan(rows=4),
    StepPlan(sequences=2),
    StepPlan(sequences=2, rows=4),
    StepPlan(rows=4, rows_exact=True),
    StepPlan(sequences=2, rows=4, rows_exact=True, dw_rows=0.5),
    StepPlan(bypass=6),
    StepPlan(bypass=6, bypass_keys=True),
    StepPlan(bypass=6, rows=4),
    StepPlan(bypass=6, bypass_keys=True, sequences=2, rows=4, rows_exact=True),
    StepPlan(dw_rows=0.25),
    StepPlan(sample=(0.25, 0.5, 0.75)),
    StepPlan(sample=(0.25, 0.5, 0.75), dw_rows=0.5, rows=6),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.key)
def test_flops_equal_torchs_counter(plan):
    model = build()
    x, y = data()
    sequences = torch.arange(plan.sequences) if plan.sequences else None
    chosen = Chosen(sequences, pick(plan.sequences or B, plan.rows) if plan.rows else None)
    with FlopCounterMode(display=False) as counter:
        Stepper(model).step(x, y, plan, choose=lambda _: chosen, bypass_BR=pick(B, 6) if plan.bypass else None)
    assert plan_flops(model.cfg, B, plan).total == counter.get_total_flops()


@pytest.mark.parametrize(
    "parts",
    [(Part(0, 4, 12),), (Part(1, 0, 4), Part(1, 8, 12)), (Part(0, 0, 4), Part(0, 4, 16, "sign"))],
)
def test_flops_of_strips_layers_and_skips_equal_torchs_counter(parts):
    model = build()
    x, y = data()
    names = [
        n
        for n, p in model.named_parameters()
        if p.dim() == 2 and n.startswith(("blocks.1", "blocks.2.mlp")) and min(p.shape) == 16
    ]
    active = Active({name: parts for name in names if "mlp" not in name}, 1)
    skip = frozenset({(2, "mlp")})
    with FlopCounterMode(display=False) as counter:
        Stepper(model).step(x, y, PLAIN, active, skip=skip)
    assert plan_flops(model.cfg, B, PLAIN, active, skip=skip).total == counter.get_total_flops()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(rows=T + 1), "plan.rows"),
        (StepPlan(sequences=B + 1), "plan.sequences"),
        (StepPlan(sample=(0.5,)), "plan.sample"),
        (StepPlan(bypass=4), "bypass_BR"),
        (StepPlan(bypass=4, bypass_first=2), "plan.bypass"),
        (StepPlan(rows=3), "choose"),
        (StepPlan(sequences=2), "choose"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, message):
    x, y = data()
    with pytest.raises(ValueError, match=message):
        Stepper(build()).step(x, y, plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 4, T])
@pytest.mark.parametrize("sequences", [0, 2])
def test_fused_backward_is_the_same_with_and_without_the_saved_logsumexp(monkeypatch, sequences, rows, dtype):
    model, (x, y) = build("sdpa"), data()
    chosen = Chosen(
        torch.tensor([1, 3]) if sequences else None, pick(sequences or B, rows) if rows else None
    )  # the last row of a sequence is not always kept
    plan = StepPlan(sequences=sequences, rows=rows)
    step = Stepper(model, dtype)
    found = step.step(x, y, plan, choose=lambda _: chosen).gradients
    used = []
    monkeypatch.setattr(Saved, "lse_BHT", property(lambda saved: used.append(saved)))
    other = step.step(x, y, plan, choose=lambda _: chosen).gradients
    assert used
    assert found.keys() == other.keys()
    for name, (ours,) in found.items():
        distance = (ours - other[name][0]).norm() / other[name][0].norm()
        assert distance < (1e-12 if dtype == torch.float64 else 0.03), name


@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("entries", [1, 2 * 2 * 4 * T])
def test_attention_of_kept_rows_in_parts_has_the_same_bits(monkeypatch, sequences, entries):
    """All sequences at once, one at a time, two at a time: sequences do not see each other."""
    model, (x, y) = build("sdpa"), data()
    chosen = Chosen(torch.tensor([1, 3]) if sequences else None, pick(sequences or B, 4))
    plan, step = StepPlan(sequences=sequences, rows=4), Stepper(model)
    whole = step.step(x, y, plan, choose=lambda _: chosen).gradients
    calls = []
    monkeypatch.setattr(backprop, "CACHED", entries)
    rows_backward = backprop.b.rows_backward
    monkeypatch.setattr(backprop.b, "rows_backward", lambda *given: calls.append(len(given[0])) or rows_backward(*given))
    parts = step.step(x, y, plan, choose=lambda _: chosen).gradients
    assert set(calls) == {backprop.together(sequences or B, 2 * 4 * T)}
    assert max(calls) < (sequences or B) or entries > 1
    for name, (gradient,) in whole.items():
        assert torch.equal(gradient, parts[name][0]), name


def test_parts_are_of_one_size(monkeypatch):
    monkeypatch.setattr(backprop, "CACHED", 100)
    assert [backprop.together(count, 30) for count in (1, 4, 6, 7, 9)] == [1, 2, 3, 1, 3]
    assert backprop.together(8, 1000) == 1
