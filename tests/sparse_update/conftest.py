"""An independent, plain float64 implementation of the Transformer's equations, for comparison."""

from __future__ import annotations

import math

import pytest
import torch


def _norm(x, gain, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def _rotate(x, base):
    """Complex form of the rotary map: channel pair (i, i + K/2) as a complex number times exp(i angle)."""
    length, width = x.shape[-2:]
    angle = torch.outer(
        torch.arange(length, dtype=torch.float64),
        base ** (-2.0 * torch.arange(width // 2, dtype=torch.float64) / width),
    )
    z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def reference_logits(model, tokens, keep=None):
    """Logits from a state dict of float64 weights; `keep` (B, T) bool cuts gradients at rows that are False."""
    cfg, p = model.cfg, dict(model.named_parameters())
    p.setdefault("head.weight", p["embed.weight"])

    def cut(x):
        return x if keep is None else torch.where(keep[..., None], x, x.detach())

    x = p["embed.weight"][tokens]
    length, head = tokens.shape[1], cfg.width // cfg.heads
    for i in range(cfg.layers):
        at = f"blocks.{i}."
        x = cut(x)
        n = _norm(x, p[at + "norm1.weight"], cfg.norm_eps)
        heads = []
        for h in range(cfg.heads):
            part = slice(h * head, (h + 1) * head)
            q = _rotate(n @ p[at + "attn.q.weight"][part].T, cfg.rotary_base)
            k = cut(_rotate(n @ p[at + "attn.k.weight"][part].T, cfg.rotary_base))
            v = cut(n @ p[at + "attn.v.weight"][part].T)
            scores = torch.einsum("bqk,bsk->bqs", q, k) / math.sqrt(head)
            future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
            e = torch.exp(scores - scores.amax(-1, keepdim=True).detach()).masked_fill(future, 0.0)
            heads.append(torch.einsum("bqs,bsk->bqk", e / e.sum(-1, keepdim=True), v))
        x = x + torch.cat(heads, -1) @ p[at + "attn.o.weight"].T
        n = _norm(x, p[at + "norm2.weight"], cfg.norm_eps)
        h = torch.clamp(n @ p[at + "mlp.fc1.weight"].T, min=0)
        x = x + (h**2 if cfg.activation == "relu2" else h) @ p[at + "mlp.fc2.weight"].T
    return _norm(cut(x), p["norm.weight"], cfg.norm_eps) @ p["head.weight"].T


@pytest.fixture
def reference():
    return reference_logits
