"""Masked updates against torch's optimizers with a rate for each matrix, and the paper's formula worked out in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_update import attach, masked
from sparse_update.nested import pack, unpack
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.masking import Mask, MaskConfig
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, SubsetConfig, choose

KINDS = ("random", "agreement", "surprise")


def build():
    torch.manual_seed(0)
    return Transformer(ModelConfig(width=8, layers=2, heads=2, context=8, vocab_size=11, attention="explicit"))


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return {name: (torch.randn(p.shape, generator=generator),) for name, p in model.named_parameters()}


def trained(name="adamw", steps=6, seed=3, **mask):
    """A model after some steps on made-up gradients, its optimizer, and the factors of each step by matrix."""
    model, factors = build(), []
    cfg = OptimConfig(name=name, grad_clip=0.0, mask=MaskConfig(**mask))
    optimizer = Optimizer(model, Active.everything(model), cfg, seed)
    for step in range(steps):
        optimizer.set_gradients(gradients(model, step))
        optimizer.step(0.3)
        if optimizer.mask is not None:
            kept = {key: float(value) for key, value in optimizer.mask.kept.items()}
            s = {key: float(m[0]) if len(m) == 1 else 1.0 for key, m in optimizer.mask.memory.items()}
            factors.append({key: kept[key] * s[key] * cfg.mask.scale for key in kept})
    return model, optimizer, factors


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_step_is_a_step_with_a_rate_for_each_matrix(name, kind):
    """Decoupled decay and update are both proportional to the rate, so a factor on one is a factor on the other."""
    model, optimizer, factors = trained(name, kind=kind, scale=1.5)
    peer = build()
    cfg = OptimConfig(name=name)
    from sparse_update.weights.settings import schedule

    rate = schedule(0.3, cfg)
    inner = {n: p for n, p in peer.named_parameters() if p.dim() == 2 and n.startswith("blocks.")}
    outer = {n: p for n, p in peer.named_parameters() if n not in inner}
    rest = [{"params": [p], "weight_decay": cfg.weight_decay if p.dim() == 2 else 0.0, "n": n} for n, p in outer.items()]
    each = [{"params": [p], "weight_decay": cfg.weight_decay, "n": n} for n, p in inner.items()]
    adam = torch.optim.AdamW(rest + (each if name == "adamw" else []), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    muon = torch.optim.Muon(each, lr=cfg.muon_lr) if name == "muon" else None
    for step, factor in enumerate(factors):
        for key, (g,) in gradients(peer, step).items():
            dict(peer.named_parameters())[key].grad = g
        for part, peak in ((adam, cfg.lr), (muon, cfg.muon_lr)):
            if part is not None:
                for group in part.param_groups:
                    group["lr"] = peak * rate * factor.get(group["n"], 1.0)
                part.step()
    assert {0.0} < {value for factor in factors for value in factor.values()}
    for (key, ours), theirs in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6), key
    momentum = {n: adam.state[p]["exp_avg"] for n, p in {**outer, **({} if muon else inner)}.items()}
    momentum |= {n: muon.state[p]["momentum_buffer"] for n, p in inner.items()} if muon else {}
    for key in momentum:  # moments know nothing of masks
        assert torch.allclose(optimizer._momentum(key), momentum[key], atol=1e-6), key


def test_the_agreement_is_the_papers_formula():
    """s = 0.9 s + 0.1 sigmoid(cos(m, g) / 2) with Adam's m, in float64 by numpy."""
    _, optimizer, _ = trained(steps=5, kind="agreement")
    shape = build()
    m, s = {}, {}
    for step in range(5):
        for key, (g,) in gradients(shape, step).items():
            g = g.double().numpy()
            m[key] = 0.9 * m.get(key, 0) + 0.1 * g
            cosine = (m[key] * g).sum() / np.sqrt((m[key] ** 2).sum() * (g**2).sum())
            now = 1 / (1 + np.exp(-cosine / 2))
            s[key] = 0.9 * s[key] + 0.1 * now if key in s else now
    assert len(optimizer.mask.memory) == 12
    for key, kept in optimizer.mask.memory.items():
        assert float(kept) == pytest.approx(s[key], abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_dropped_stays_bit_for_bit_and_what_is_kept_moves_as_ever(name):
    before = build()
    model, optimizer, _ = trained(name, steps=1, kind="random")
    dense, _, _ = trained(name, steps=1)
    kept = {key for key, value in optimizer.mask.kept.items() if value}
    assert 0 < len(kept) < 12
    for (key, p), old, new in zip(model.named_parameters(), before.parameters(), dense.parameters(), strict=True):
        dropped = key in optimizer.mask.kept and key not in kept
        assert torch.equal(p, old if dropped else new), key
    assert all(key.startswith("blocks.") for key in optimizer.mask.kept)


def test_a_mask_that_keeps_all_is_dense_training_to_the_bit():
    for a, b in zip(trained(kind="random", keep=1.0)[0].parameters(), trained()[0].parameters(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.9), st.integers(0, 1000))
def test_coins_are_independent_and_of_the_chance_asked_for(keep, seed):
    mask = Mask(MaskConfig(kind="random", keep=keep), seed)
    w = torch.zeros(3, 2, requires_grad=True)
    w.grad = torch.ones(3, 2)
    draws = []
    for _ in range(400):
        mask.before({"a": w, "b": w})
        draws.append([float(mask.kept["a"]), float(mask.kept["b"])])
    found = np.array(draws)
    assert abs(found.mean() - keep) < 5 * np.sqrt(keep * (1 - keep) / 800)
    assert abs(np.cov(found.T)[0, 1]) < 5 * keep * (1 - keep) / np.sqrt(400)


def test_surprise_keeps_the_share_whose_gradient_lies_highest_above_its_past():
    weights = {str(i): torch.zeros(2, 3, requires_grad=True) for i in range(6)}
    mask = Mask(MaskConfig(kind="surprise", keep=0.5), 0)
    size = {name: 10.0 ** float(name) for name in weights}  # of very different size: only their own past counts
    for step in range(12):
        for i, (name, w) in enumerate(weights.items()):
            wave = 1 + 0.2 * ((step + i) % 3)
            w.grad = torch.full((2, 3), size[name] * (wave + (9 if step == 11 and name in "024" else 0)))
        mask.before(weights)
        mask.after(lambda name: torch.zeros(2, 3))
        assert sum(float(kept) for kept in mask.kept.values()) == 3
    assert {name for name, kept in mask.kept.items() if kept} == {"0", "2", "4"}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_are_masked_as_if_they_were_matrices_of_their_own(kind):
    torch.manual_seed(1)
    whole, cut = torch.randn(7, 4, requires_grad=True), None
    cut = [part.clone().detach().requires_grad_() for part in whole.detach().split(3)]
    masks = [Mask(MaskConfig(kind=kind, block_rows=rows), 5) for rows in (3, 0)]
    optimizers = [torch.optim.AdamW([whole]), torch.optim.AdamW(cut)]
    for step in range(5):
        g = torch.randn(7, 4, generator=torch.Generator().manual_seed(step))
        whole.grad = g.clone()
        for part, piece in zip(cut, g.split(3), strict=True):
            part.grad = piece.clone()
        for mask, optimizer, given_ in zip(
            masks, optimizers, ({"0": whole}, {str(i): part for i, part in enumerate(cut)}), strict=True
        ):
            mask.before(given_)
            optimizer.step()
            mask.after(lambda name, o=optimizer, w=given_: o.state[w[name]]["exp_avg"])
    assert torch.allclose(whole, torch.cat(cut), atol=1e-7)
    assert len(masks[0].kept["0"]) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_draws_and_scales_as_the_whole_one(name, kind):
    whole, _, _ = trained(name, steps=7, kind=kind)
    model, optimizer, _ = trained(name, steps=4, kind=kind)
    tensors, outline = pack(optimizer.state_dict())
    again = Optimizer(model, Active.everything(model), optimizer.cfg, seed=99)
    again.load_state_dict(unpack(outline, {k: v.clone() for k, v in tensors.items()}))
    for step in range(4, 7):
        again.set_gradients(gradients(model, step))
        again.step(0.3)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_strips_that_take_turns_are_masked_and_forgotten():
    model = build()
    subset = SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4)
    optimizer = Optimizer(model, choose(model, subset, 0, 0), OptimConfig(mask=MaskConfig(kind="agreement")))
    for turn in (0, 1):
        active = choose(model, subset, turn, 0)
        optimizer.activate(active)
        optimizer.set_gradients(
            {n: tuple(part.of(gradients(model, turn)[n][0]) for part in parts) for n, parts in active.parts.items()}
        )
        optimizer.step(0.5)
        assert set(optimizer.mask.memory) == {key for key in optimizer.leaves if key.startswith("blocks.") and "[" in key}


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    mask, w = Mask(MaskConfig(kind="agreement"), 0), torch.ones(2, 2, requires_grad=True)
    w.grad = torch.full((2, 2), float("inf"))
    mask.before({"w": w})
    mask.after(lambda name: w.grad)
    assert torch.equal(w.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(
    "settings_", [{"kind": "half"}, {"keep": 0.0}, {"keep": 1.5}, {"scale": 0.0}, {"memory": 1.0}, {"block_rows": -1}]
)
def test_bad_settings_are_refused(settings_):
    with pytest.raises(ValueError, match=r"mask\."):
        MaskConfig(**settings_)


@pytest.mark.parametrize("name", ["sign", "galore"])
def test_optimizers_without_a_momentum_of_the_weights_shape_are_refused(name):
    with pytest.raises(ValueError, match="use adamw or muon"):
        OptimConfig(name=name, mask=MaskConfig(kind="random"))


def test_a_checkpoint_of_other_updates_is_refused():
    _, dense, _ = trained()
    _, random, _ = trained(kind="random")
    with pytest.raises(ValueError, match="not masked"):
        random.load_state_dict(dense.state_dict())


# on an optimizer of one's own


def pair(kind, make, **kw):
    """A model and its masked optimizer; the embedding and the head always move."""
    model = build()
    always = [model.embed.weight, model.head.weight]
    return model, masked(make(model.parameters()), kind, exclude=always, **kw)


def advance(model, optimizer, first, last):
    for step in range(first, last):
        for p, (g,) in zip(model.parameters(), gradients(model, step).values(), strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrapper_is_what_the_trainer_does(kind):
    cfg = OptimConfig(grad_clip=0.0, weight_decay=0.0, warmup_fraction=0.0, mask=MaskConfig(kind=kind))
    ours = build()
    trainer = Optimizer(ours, Active.everything(ours), cfg, seed=4)
    for step in range(5):
        trainer.set_gradients(gradients(ours, step))
        trainer.step(0.0)
    model, optimizer = pair(
        kind, lambda p: torch.optim.AdamW(p, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0), seed=4
    )
    advance(model, optimizer, 0, 5)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


MAKERS = {
    "adamw": torch.optim.AdamW,
    "muon-like sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_optimizers_own_checkpoint_resumes_to_the_bit(kind, make, tmp_path):
    whole, optimizer = pair(kind, make)
    advance(whole, optimizer, 0, 7)
    model, first = pair(kind, make)
    advance(model, first, 0, 4)
    torch.save(first.state_dict(), tmp_path / "o.pt")
    twin, second = pair(kind, make, seed=77)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    second.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    advance(twin, second, 4, 7)
    for a, b in zip(twin.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rmsprop_agrees_with_a_running_mean_of_its_gradients():
    model, optimizer = pair("agreement", torch.optim.RMSprop)
    advance(model, optimizer, 0, 3)
    grads = [gradients(model, step)["blocks.0.mlp.fc1.weight"][0].double() for step in range(3)]
    m = sum(0.1 * 0.9 ** (2 - i) * g for i, g in enumerate(grads))
    hooks = optimizer._update_mask
    (found,) = (v for k, v in hooks.momenta.items() if k == str(id(model.blocks[0].mlp.fc1.weight)))
    assert torch.allclose(found.double(), m, atol=1e-6)


def test_the_wrapper_masks_the_strips_of_a_gate():
    model = build()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "change_every_steps": 2}})
    optimizer = masked(torch.optim.AdamW(gate.parameters(), lr=1e-2), "random")
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        gate.loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()
    assert 0 < len(optimizer._update_mask.mask.kept) <= len(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_gate_whose_strips_take_turns_resumes_to_the_bit(kind):
    def parts(model, seed):
        weights = {"kind": "blocks", "active_fraction": 0.5, "change_every_steps": 3, "block_rows": 4}
        gate = attach(model, {"weights": weights})
        return gate, masked(torch.optim.AdamW(gate.parameters(), lr=1e-2), kind, seed=seed)

    def steps(model, gate, optimizer, first, last):
        for step in range(first, last):
            tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(step))
            gate.loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
            optimizer.step()
            gate.step(optimizer)
            optimizer.zero_grad()

    whole, twin = build(), build()
    gate, optimizer = parts(whole, 0)
    steps(whole, gate, optimizer, 0, 4)
    saved = copy.deepcopy((whole.state_dict(), gate.state_dict(), optimizer.state_dict()))
    steps(whole, gate, optimizer, 4, 8)
    again, second = parts(twin, 9)
    twin.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    again.adopt(second)
    second.load_state_dict(saved[2])
    steps(twin, again, second, 4, 8)
    for a, b in zip(twin.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_the_wrapper_cannot_do_is_refused():
    model, optimizer = pair("agreement", torch.optim.AdamW)
    with pytest.raises(ValueError, match="masked already"):
        masked(optimizer)
    with pytest.raises(ValueError, match="call backward first"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="leave the call out"):
        masked(torch.optim.AdamW(model.parameters()), "none")
    with pytest.raises(ValueError, match="an optimizer of torch"):
        masked(model)
    with pytest.raises(ValueError, match="kind 'none'"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    sparse = masked(torch.optim.SparseAdam(embedding.parameters()), "random")
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient"):
        sparse.step()
