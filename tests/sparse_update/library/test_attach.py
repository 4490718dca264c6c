"""The gate on any module, against torch's autograd on the plain model, torch's FLOP counter, and counted bytes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sparse_update.library.attach import attach
from sparse_update.library.tracking.rows import GateError
from sparse_update.transformer import ModelConfig, Transformer
from tests.sparse_update.library.models import (
    B,
    Encoder,
    T,
    V,
    cut,
    data,
    gradients,
    logits_of,
    ours,
    same,
    token_losses,
    top_rows,
)

# everything kept, and detached again


def test_all_kept_equals_autograd_and_detach_restores(model):
    x, y = data()
    plain = logits_of(model, x).detach().clone()
    token_losses(model, x, y).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    gate = attach(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(logits_of(model, x).detach(), plain, rtol=0, atol=0)
    gate.loss(logits_of(model, x), y).backward()
    same(gradients(model), expected, rtol=1e-10, atol=1e-13)
    model.zero_grad()
    gate.loss(token_losses(model, x, y)).backward()
    same(gradients(model), expected, rtol=1e-10, atol=1e-13)
    assert gate.detach() is model
    assert [type(m) for m in model.modules()] == kinds
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(logits_of(model, x), plain)
    with pytest.raises(GateError, match="detached"):
        gate.loss(logits_of(model, x), y)


def test_updates_stay_after_detach():
    torch.manual_seed(0)
    model = ours()
    flags = {n: n != "blocks.0.mlp.fc1.weight" for n, _ in model.named_parameters()}
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x, y = data()
    gate = attach(model, {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4}})
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    gate.loss(model(x), y).backward()
    optimizer.step()
    gate.detach()
    after = model.state_dict()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    changed = (after["blocks.1.mlp.fc1.weight"] != before["blocks.1.mlp.fc1.weight"]).any(1)
    assert changed.tolist() == [True] * 32 + [False] * 32
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


# token rows


def test_kept_rows_equal_autograd_with_the_others_detached(model):
    if isinstance(model, Encoder):
        pytest.skip("torch's attention calls no Linear module that a hook could cut; see the test of the encoder below")
    x, y = data()
    keep = top_rows(token_losses(model, x, y), 6)
    reference = copy.deepcopy(model)
    cut(reference, keep)
    (token_losses(reference, x, y) * keep).sum().div(B * 6).backward()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    gate.loss(logits_of(model, x), y).backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-13)
    # rows of one backward do not reach into the next
    model.zero_grad()
    reference = copy.deepcopy(gate.detach())
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    gate.loss(logits_of(model, x), y).backward()
    model.zero_grad()
    token_losses(model, x, y).mean().backward()
    token_losses(reference, x, y).mean().backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_encoder_drops_rows_of_its_joint_projection(batch_first):
    torch.manual_seed(3)
    model = Encoder(batch_first).double()
    x, y = data()
    keep = top_rows(token_losses(model, x, y), 6)
    reference = copy.deepcopy(model)
    cut(reference, keep)

    def project(q, k, v, w, b=None):
        out = plain_projection(q, k, v, w, b)
        return [torch.where(keep.t()[..., None], part, part.detach()).contiguous() for part in out]

    plain_projection = F._in_projection_packed
    plain_linear = F.linear

    def linear(y_, w, b=None):
        out = plain_linear(y_, w, b)
        if out.shape[0] == B * T and w.shape == (16, 16):  # the output projection, on (T B, D)
            return torch.where(keep.t().flatten()[..., None], out, out.detach())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "_in_projection_packed", project)
        patch.setattr(F, "linear", linear)
        (token_losses(reference, x, y) * keep).sum().div(B * 6).backward()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    gate.loss(model(x), y).backward()
    same(gradients(model), gradients(reference), rtol=1e-9, atol=1e-13)


def test_exact_rows_equal_the_masked_loss(model):
    x, y = data()
    losses = token_losses(model, x, y)
    keep = top_rows(losses, 6)
    (losses * keep).sum().div(B * 6).backward()
    expected = gradients(model)
    model.zero_grad()
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "below": "exact"}})
    for _ in range(2):
        model.zero_grad()
        gate.loss(logits_of(model, x), y).backward()
        same(gradients(model), expected, rtol=1e-9, atol=1e-13)
    assert any("head" in name for name in gate.exact_layers())
    assert not any(
        name.split(".")[-1] in ("k", "v", "k_proj", "v_proj", "c_attn", "in_proj") for name in gate.exact_layers()
    )


def test_exact_layers_are_found_through_zero_weights():
    """Residual outputs that start at zero hide dependence from values, not from the probe."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=16, layers=3, heads=2, context=T, vocab_size=V))
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5, "below": "exact"}})
    assert gate.probe(data()[0]) == ["blocks.2.attn.q", "blocks.2.attn.o", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2", "head"]
    assert all(p.grad is None for p in model.parameters())


def test_whole_sequences_equal_the_plain_loss_on_them(model):
    x, y = data()
    with torch.no_grad():
        chosen = token_losses(model, x, y).mean(1).topk(2).indices
    token_losses(model, x[chosen], y[chosen]).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    gate = attach(model, {"backward": {"unit": "sequence", "keep_fraction": 0.5}})
    gate.loss(logits_of(model, x), y).backward()
    same(gradients(model), expected, rtol=1e-9, atol=1e-13)


def test_labels_of_transformers_are_shifted_and_ignored_ones_are_chosen_last():
    torch.manual_seed(3)
    model = ours().double()
    x, _ = data()
    labels = x.clone()
    labels[0, 3:] = -100
    gate = attach(model, {"backward": {"unit": "token", "keep_fraction": 0.5}})
    with torch.no_grad():
        plain = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(gate.loss(model(x), labels, shift=True), plain)
    losses = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(B, T - 1)
    kept = [losses[0, :2], *(row.topk(6).values for row in losses[1:])]
    torch.testing.assert_close(gate.loss(model(x), labels, shift=True), torch.cat(kept).mean())
