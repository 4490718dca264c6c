"""Rates by the width of the model: against torch's own optimizers on groups written out by hand."""

from __future__ import annotations

import pytest
import torch

from sparse_update.nested import pack, unpack
from sparse_update.step.backward import sparse_step
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, SubsetConfig
from tests.sparse_update.growth.schedules import build, write_text


def made(tied, width=16):
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(width=width, layers=2, heads=2, context=12, vocab_size=23, attention="explicit", tie_embeddings=tied)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_wide_matrices_move_by_base_over_width(name, tied):
    ours, theirs = made(tied), made(tied)
    cfg = OptimConfig(name=name, base_width=4, grad_clip=0.0, warmup_fraction=0.0)
    optimizer = Optimizer(ours, Active.everything(ours), cfg)
    plain, wide, muon = [], [], []
    for key, p in theirs.named_parameters():
        block = key.startswith("blocks.") and p.dim() == 2
        (muon if block and name == "muon" else wide if block or key == "head.weight" else plain).append(p)
    common = {"betas": (cfg.beta1, cfg.beta2), "fused": True}
    groups = [
        {"params": [p for p in plain if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in plain if p.dim() == 1], "weight_decay": 0.0},
        {"params": wide, "weight_decay": 0.1, "lr": cfg.lr / 4},
    ]
    peers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, **common)]
    peers += [torch.optim.Muon(muon, lr=cfg.muon_lr, weight_decay=0.1)] if muon else []
    tokens = torch.randint(0, 23, (4, 13), generator=torch.Generator().manual_seed(1))
    for step in range(4):
        if step == 2:  # a resumed optimizer goes on to the same bits
            tensors, outline = pack(optimizer.state_dict())
            optimizer = Optimizer(ours, Active.everything(ours), cfg)
            optimizer.load_state_dict(unpack(outline, tensors))
        optimizer.set_gradients(sparse_step(ours, tokens[:, :-1], tokens[:, 1:]).gradients)
        for key, found in sparse_step(theirs, tokens[:, :-1], tokens[:, 1:]).gradients.items():
            theirs.get_parameter(key).grad = found[0]
        optimizer.step(0.0)
        for peer in peers:
            peer.step()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_at_the_base_width_nothing_changes(tmp_path):
    corpus = write_text(tmp_path)
    losses = []
    for base in (0, 16):
        trainer, reports = build(corpus, tmp_path / str(base), steps=6, optim=OptimConfig(base_width=base))
        trainer.run()
        losses.append([r.loss_nats for r in reports])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "kw", [{"base_width": -1}, {"base_width": 64, "name": "sign"}, {"base_width": 64, "name": "galore"}]
)
def test_other_optimizers_and_widths_are_refused(kw):
    with pytest.raises(ValueError, match=r"optim\.base_width"):
        OptimConfig(**kw)


def test_a_part_of_the_weights_is_refused(tmp_path):
    corpus = write_text(tmp_path)
    subset = SubsetConfig(kind="layers", active_fraction=0.5)
    with pytest.raises(ValueError, match="trained whole"):
        build(corpus, tmp_path / "run", subset=subset, optim=OptimConfig(base_width=8))
