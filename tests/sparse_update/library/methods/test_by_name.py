"""Published methods by name: their settings, what they ask of the user, their choices computed by hand, their resume."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from sparse_update.gates.config import GateConfig
from sparse_update.library.attach import attach
from sparse_update.library.methods.presets import METHODS
from sparse_update.library.settings import AttachConfig
from sparse_update.library.tracking.rows import GateError
from tests.sparse_update.library.models import B, T, V, data, gpt2, gradients, logits_of, ours, same, token_losses

ROOT = Path(__file__).resolve().parents[4]
BEFORE = ("rho_loss", "infobatch", "selective_backprop")
REFERENCE = ("rho1", "rho_loss")


def row():
    return nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, V))


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


# settings


def shipped(name):
    (path,) = (ROOT / "configs/published").rglob(f"{name}.yaml")
    return path.parent.name, yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_settings_of_our_trainer(name):
    group, theirs = shipped(name)
    assert theirs.pop("name") == name
    cfg = AttachConfig.from_dict({"method": name})
    assert cfg.method == name
    if group == "subset":
        assert {key: getattr(cfg.weights, key) for key in theirs} == theirs
        return
    unit = theirs.pop("unit")
    if unit == "gradient":
        vcas = {f.name: f.default for f in dataclasses.fields(GateConfig) if f.name.startswith("vcas_")}
        assert {
            f"vcas_{key}": getattr(cfg.gradient, key) for key in ("tau", "every", "repetitions", "alpha", "beta")
        } == vcas
        assert (cfg.gradient.unit, cfg.gradient.rows) == ("vcas", GateConfig().dw_fraction)
    ours = cfg.before if unit == "sequence" else cfg.backward
    if unit == "token_exact":
        assert (ours.unit, ours.below) == ("token", "exact")
    assert {key: getattr(ours, key) for key in theirs} == theirs
    assert re.search(r"arXiv \d{4}\.\d{5}", METHODS[name].source)[0] in next(
        (ROOT / "configs/published").rglob(f"{name}.yaml")
    ).read_text(encoding="utf-8")


def test_single_settings_are_changed_and_unknown_names_refused():
    cfg = AttachConfig.from_dict({"method": "selective_backprop", "before": {"policy_options": {"beta": 2.0}}, "seed": 3})
    assert cfg.before.policy_options == {"beta": 2.0, "history": 1024}
    assert (cfg.before.policy, cfg.before.keep_fraction, cfg.seed) == ("cdf", 0.5, 3)
    # options of a policy go with it
    assert AttachConfig.from_dict({"method": "selective_backprop", "before": {"policy": "top"}}).before.policy_options == {}
    gate = attach(made(row), method="lisa", weights={"change_every_steps": 7})
    assert (gate.cfg.weights.kind, gate.cfg.weights.change_every_steps) == ("layers", 7)
    gate.detach()
    with pytest.raises(ValueError, match=r"method = 'rho-1': one of badam, .*infobatch.*rho1"):
        attach(row(), method="rho-1")
    with pytest.raises(ValueError, match=r"weights\.every is no setting"):
        attach(row(), {"method": "lisa", "weights": {"every": 3}})
    with pytest.raises(ValueError, match="AttachConfig"):
        attach(row(), AttachConfig(), method="lisa")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rho1"}, r"'rho1' .*reference model.*reference=MODULE.*reference_losses"),
        ({"method": "rho_loss"}, r"'rho_loss' .*reference model.*before\.reference"),
        ({"method": "rho_loss", "reference": "given"}, r"before\.reference"),
        ({"method": "infobatch", "total_steps": 9}, r"'infobatch' .*number.*before={'index'"),
        ({"method": "infobatch", "before": {"index": "number"}}, "total_steps=N"),
        ({"method": "lisa", "reference": row()}, "nothing in these settings asks for it"),
        ({"method": "rho1", "reference": 3}, "reference = int"),
    ],
)
def test_what_a_method_needs_is_asked_for_at_attach(settings, message):
    model = row()
    with pytest.raises(GateError, match=message):
        attach(model, **settings)
    attach(model).detach()  # nothing was left on it


def test_a_reference_that_moves_along_is_refused():
    model = row()
    with pytest.raises(GateError, match="shares parameters"):
        attach(model, method="rho1", reference=model)
    with pytest.raises(GateError, match="shares parameters"):
        attach(model, method="rho1", reference=nn.Sequential(*model))


# Rho-1: the loss of the tokens of largest excess, exactly


@pytest.mark.parametrize("make", [lambda: ours().double(), lambda: gpt2().double(), lambda: row().double()])
def test_rho1_is_the_loss_of_the_largest_excess(make):
    model, other = made(make, 3), made(make, 4)
    x, y = data()
    with torch.no_grad():
        excess = token_losses(model, x, y) - token_losses(other, x, y)
    keep = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        order = sorted(range(T), key=lambda t: float(excess[b, t]), reverse=True)
        keep[b, order[: round(0.6 * T)]] = True
    expected = token_losses(model, x, y)[keep].mean()
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    gate = attach(model, method="rho1", reference=other.train())
    loss = gate.loss(logits_of(model, x), y, tokens=x)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    same(gradients(model), wanted, rtol=1e-9, atol=1e-13)
    assert not any(p.grad is not None for p in other.parameters())
    file = io.BytesIO()
    torch.save(gate.state_dict(), file)
    assert file.tell() < 20_000  # choices, and no second model
    gate.detach()
    model.zero_grad()
    gate = attach(model, method="rho1", reference="given")
    given = token_losses(other, x, y).detach()
    torch.testing.assert_close(gate.loss(logits_of(model, x), y, reference_losses=given), expected.detach())
    torch.testing.assert_close(gate.loss(token_losses(model, x, y), reference_losses=given), expected.detach())
    with pytest.raises(GateError, match="reference_losses"):
        gate.loss(logits_of(model, x), y)
    with pytest.raises(ValueError, match="one each"):
        gate.loss(logits_of(model, x), y, reference_losses=given[1:])


def test_a_reference_by_transformers_labels_and_by_a_checkpoint_it_cannot_read():
    model, other = made(gpt2, 3), made(gpt2, 4)
    tokens = data()[0]
    gate = attach(model, method="rho1", reference=other)
    found = gate.loss(model(tokens).logits, tokens, shift=True)
    with torch.no_grad():
        own, theirs = (token_losses(m, tokens[:, :-1], tokens[:, 1:]) for m in (model, other))
    best = (own - theirs).topk(round(0.6 * T), dim=1).indices
    torch.testing.assert_close(found, own.gather(1, best).mean())
    labels = tokens.masked_fill(torch.arange(T) < 3, -100)
    with pytest.raises(GateError, match="hold -100"):
        gate.loss(model(tokens).logits, labels, shift=True)
    with pytest.raises(GateError, match="tokens=inputs"):
        gate.loss(model(tokens).logits[:, :-1], tokens[:, 1:])
    small = nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, V - 9))
    gate.detach()
    gate = attach(model, method="rho1", reference=small)
    with pytest.raises(ValueError, match=f"knows {V - 9} tokens"):
        gate.loss(model(tokens).logits, tokens, shift=True)


# methods that score with a forward before the step


def sequences(n=64):
    tokens = torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(5))
    number = torch.arange(n)[:, None]
    return tokens.where(number % 2 == 0, (torch.arange(T) + number) % V)


def mapped(tokens, size=8):
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        yield {"input_ids": part, "number": torch.arange(start, start + len(part))}


def mean_losses(model, tokens):
    model.eval()
    with torch.no_grad():
        found = token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean(1)
    model.train()
    return found


def numbers(batches):
    return [i for batch in batches for i in batch["number"].tolist()]


@pytest.mark.parametrize("make", [gpt2, row])
def test_rho_loss_takes_the_tenth_of_largest_excess(make):
    model, other = made(make, 1), made(make, 2)
    tokens = sequences(80)
    excess = mean_losses(model, tokens) - mean_losses(other, tokens)
    wanted = [sorted(range(p, p + 40), key=lambda i: float(-excess[i]))[:4] for p in (0, 40)]
    gate = attach(model, method="rho_loss", reference=other, before={"pool": 40})
    modes = {name: m.training for name, m in model.named_modules()}
    assert numbers(gate.filter(mapped(tokens), 4)) == [i for part in wanted for i in sorted(part)]
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    gate.detach()
    # the same by losses of the reference that were taken once and come with the batches, and by a function of one's own
    irreducible = mean_losses(other, tokens)
    batches = [{**b, "irreducible": irreducible[b["number"]]} for b in mapped(tokens)]
    gate = attach(model, method="rho_loss", before={"pool": 40, "reference": "irreducible"})
    out = list(gate.filter(batches, 4))
    assert numbers(out) == [i for part in wanted for i in sorted(part)]
    assert set(out[0]) == {"input_ids", "number"}
    gate.detach()
    gate = attach(model, method="rho_loss", reference=other, before={"pool": 40})
    upside = gate.filter(mapped(tokens), 4, losses=lambda m, b: -mean_losses(m, b["input_ids"]))
    assert numbers(upside) == [
        i for p in (0, 40) for i in sorted(sorted(range(p, p + 40), key=lambda i: float(excess[i]))[:4])
    ]


@pytest.mark.parametrize("make", [gpt2, row])
def test_selective_backprop_keeps_by_the_rank_among_past_losses(make):
    model, tokens = made(make, 1), sequences(96)
    loss = mean_losses(model, tokens).tolist()
    draws = torch.Generator().manual_seed(11)
    past, wanted = [], []
    for start in range(0, 96, 16):
        pool = range(start, start + 16)
        past = [*past, *(loss[i] for i in pool)][-32:]
        uniform = torch.rand(16, generator=draws).tolist()
        share = [sum(p <= loss[i] for p in past) / len(past) for i in pool]
        wanted += [i for i, u, s in zip(pool, uniform, share, strict=True) if u < s**2]
    given = {"pool": 16, "policy_options": {"beta": 2.0, "history": 32}}
    gate = attach(model, method="selective_backprop", seed=11, before=given)
    found = numbers(gate.filter(mapped(tokens), 4))
    assert 16 < len(wanted) < 64
    assert found == wanted[: len(found)]
    assert len(wanted) - len(found) < 4
    assert gate.report()["kept"] == len(wanted)


def test_infobatch_drops_half_of_what_was_easy_and_weighs_the_other_half():
    model, tokens = made(row, 1), sequences(32)
    gate = attach(model, method="infobatch", seed=11, total_steps=40, before={"pool": 32, "index": "number"})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.3)
    draws, last, step, dropped, waiting = torch.Generator().manual_seed(11), {}, 0, 0, []
    for _ in range(12):
        annealed = step >= 35
        for_gate = gate.filter(mapped(tokens), 4)
        if annealed:
            kept, weight = list(range(32)), [1.0] * 32
        else:
            known = sum(last.values()) / len(last) if last else 0.0
            stale = torch.tensor([last.get(i, known) for i in range(32)])
            uniform = torch.rand(32, generator=draws)
            easy = [float(s) < float(stale.mean()) for s in stale]
            kept = [i for i in range(32) if not (easy[i] and uniform[i] < 0.5)]
            weight = [(2.0 if easy[i] else 1.0) * len(kept) / 32 for i in kept]
            dropped += 32 - len(kept)
        queue = [*waiting, *zip(kept, weight, strict=True)]
        for batch in for_gate:
            now, queue = queue[:4], queue[4:]
            assert batch["number"].tolist() == [i for i, _ in now]
            x, y = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
            each = token_losses(model, x, y)
            expected = (each.mean(1) * torch.tensor([w for _, w in now])).mean()
            loss = gate.loss(model(x), y)
            torch.testing.assert_close(loss, expected)
            last |= dict(zip(batch["number"].tolist(), each.mean(1).tolist(), strict=True))
            loss.backward()
            optimizer.step()
            gate.step(optimizer)
            optimizer.zero_grad()
            step += 1
            if step == 35:
                break
        waiting = queue
    assert dropped > 20


def test_weights_find_their_batch_where_a_loader_fetches_ahead():
    model, tokens = made(row, 1), sequences(16)
    gate = attach(model, method="infobatch", total_steps=40, before={"pool": 16, "index": "number"})
    ahead = list(gate.filter(mapped(tokens, 4), 4))
    for weight, batch in enumerate(gate.pool.given, 1):
        batch.weight_B = torch.full((4,), float(weight))
    for weight, batch in enumerate(ahead, 1):
        x, y = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
        torch.testing.assert_close(gate.loss(model(x), y), weight * token_losses(model, x, y).mean())
        torch.testing.assert_close(
            gate.loss(model(batch["input_ids"]), batch["input_ids"], shift=True), weight * token_losses(model, x, y).mean()
        )
    with torch.no_grad():
        torch.testing.assert_close(gate.loss(model(x), y), token_losses(model, x, y).mean())


# layers by turns


def tower():
    return nn.Sequential(nn.Embedding(V, 8), *(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, V))


@pytest.mark.parametrize("make", [gpt2, tower])
@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_layers_by_turns(name, make):
    model = made(make)
    blocks = [m for _, m in model.transformer.h.named_children()] if hasattr(model, "transformer") else list(model[1:5])
    outside = {id(p) for p in model.parameters()} - {id(p) for m in blocks for p in m.parameters()}
    gate = attach(model, method=name, seed=2, weights={"change_every_steps": 2})
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    x, y = data()
    for step in range(10):
        turn = step // 2
        if name == "badam":
            layer, always = turn % len(blocks), set()
        else:
            draws = torch.Generator().manual_seed(2 * 1_000_003 + turn)
            torch.randperm(len(blocks), generator=draws)  # for exploring, which scored policies do
            layer, always = int(torch.randperm(len(blocks), generator=draws)[0]), outside
        wanted = {id(p) for p in blocks[layer].parameters()} | always
        assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
        before = [p.detach().clone() for p in model.parameters()]
        gate.loss(logits_of(model, x), y).backward()
        optimizer.step()
        assert {id(p) for p in optimizer.state} == wanted
        moved = {id(p) for p, was in zip(model.parameters(), before, strict=True) if not torch.equal(p, was)}
        assert moved <= wanted
        assert any(id(p) in moved for p in blocks[layer].parameters())
        gate.step(optimizer)
        optimizer.zero_grad()


# every name, on two kinds of models: it trains, and goes on to the same bits


class Stream:
    """Batches for ever, by the number of the next."""

    def __init__(self, at=0):
        self.at = at
        self.tokens = sequences(48)

    def __iter__(self):
        while True:
            start = self.at * 8 % 48
            self.at += 1
            yield {"input_ids": self.tokens[start : start + 8], "number": torch.arange(start, start + 8)}


GIVEN = {
    "rho_loss": {"before": {"pool": 16, "keep_fraction": 0.25}},
    "infobatch": {"before": {"pool": 16, "index": "number"}, "total_steps": 100},
    "selective_backprop": {"before": {"pool": 16}},
    "lisa": {"weights": {"change_every_steps": 3}},
    "badam": {"weights": {"change_every_steps": 3}},
    "frugal": {"weights": {"change_every_steps": 3, "block_rows": 4}},
    "vcas": {"gradient": {"every": 2, "alpha": 0.2, "beta": 0.6, "tau": 0.5}},
}
STEPS, STOP = 14, 7


def trained(name, make, steps, saved=None):
    model = made(make)
    reference = made(make, 9) if name in REFERENCE else None
    gate = attach(model, method=name, reference=reference, **copy.deepcopy(GIVEN.get(name, {})))
    stream, done = Stream(), 0
    if saved is not None:
        torch.manual_seed(77)
        model.load_state_dict(saved["model"])
        gate.load_state_dict(saved["gate"])
        stream, done = Stream(saved["at"]), saved["done"]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for batch in gate.filter(stream, 4 if name in BEFORE else 0):
        if done == steps:
            break
        tokens = batch["input_ids"]
        loss = gate.loss(logits_of(model, tokens), tokens, shift=True)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        gate.step(optimizer)
        optimizer.zero_grad()
        done += 1
        if done == steps:
            break
    state = {
        "model": model.state_dict(), "gate": gate.state_dict(), "optimizer": optimizer.state_dict(),
        "at": stream.at, "done": done,
    }  # fmt: skip
    return gate.detach(), losses, state


@pytest.mark.parametrize("make", [gpt2, row], ids=["gpt2", "sequential"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_resumes_to_the_same_bits(name, make):
    whole, losses, _ = trained(name, make, STEPS)
    start = made(make)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), whole.parameters(), strict=True))
    x = Stream().tokens
    if name not in BEFORE:  # which train on few or on unlike sequences here
        assert mean_losses(whole, x).mean() < mean_losses(start, x).mean()
    _, first, state = trained(name, make, STOP)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again, second, _ = trained(name, make, STEPS, torch.load(file, weights_only=True))
    assert first + second == losses
    for (label, a), b in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), label
