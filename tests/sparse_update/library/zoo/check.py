"""The gate's gradient on a model of the collection, against the plain model with dropped rows cut off by hooks.

The hooks know by hand (`Entry.rows`) which row is which token; of the gate they take only the names of the layers that it
says it follows. Whole sequences are compared with the plain loss of the kept ones: nothing is cut there at all.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.library.attach import attach
from tests.sparse_update.library.zoo.entry import Entry

HOWS = ("plain", "sliced", "float", "reshaped", "losses", "padded")
TOKEN = {"backward": {"unit": "token", "keep_fraction": 0.5, "policy": "top"}}
SEQUENCE = {"backward": {"unit": "sequence", "keep_fraction": 0.5, "policy": "top"}}


@dataclass
class Checked:
    """What was found of a model. `saved`: share of a plain step's FLOPs that torch's counter misses from a gated one."""

    report: dict[str, Any]
    saved: float = 0.0


def check(entry: Entry, attention: str, unit: str, batch: int, length: int, how: str = "plain") -> Checked:
    """Raises AssertionError where gradient, layers left dense or their reasons are not what they should be."""
    torch.manual_seed(0)
    model = entry.make(attention).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    plain = copy.deepcopy(model)
    gate = attach(model, TOKEN if unit == "token" else SEQUENCE)
    logits, labels = _result(entry, model, batch, length, how)
    given = (logits, labels) if how != "losses" else (_losses(logits, labels),)
    loss = gate.loss(*given)
    loss.backward()
    report = gate.report()
    dense = set(report["rows_not_found"])
    expected_dense = entry.expected_dense(unit, report["gated"])
    assert dense == expected_dense, f"dense {sorted(dense)}, expected {sorted(expected_dense)}: {report['why']}"
    for name in dense:
        assert re.search(entry.why, report["why"][name]), f"{name}: {report['why'][name]}"
    keep = _kept(entry, plain, unit, batch, length, how)
    followed = [name for name in report["gated"] if name not in dense]
    handles = []
    if unit == "token":
        handles = [_cut(plain.get_submodule(n), n, entry, batch, length, how, keep) for n in followed]
    logits, labels = _result(entry, plain, batch, length, how)
    each = _losses(logits, labels)
    kept = keep.view(each.shape) if unit == "token" else keep.view(-1, *[1] * (each.dim() - 1)).expand(each.shape)
    valid = kept & (labels >= 0)
    expected = (each * valid).sum() / valid.sum()
    torch.testing.assert_close(loss.detach().double(), expected.detach().double(), rtol=1e-5, atol=1e-7)
    expected.backward()
    for handle in handles:
        handle.remove()
    loose = how == "float" or entry.single
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        a, b = (torch.zeros_like(r) if r.grad is None else r.grad for r in (p, q))
        torch.testing.assert_close(
            a, b, rtol=1e-3 if loose else 1e-7, atol=1e-6 if loose else 1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    if how != "plain":
        return Checked(report)
    gated, whole = _step_flops(entry, model, batch, length, gate), _step_flops(entry, plain, batch, length)
    return Checked(report, 1 - gated / whole)


def _step_flops(entry: Entry, model: nn.Module, batch: int, length: int, gate: Any = None) -> int:
    with FlopCounterMode(display=False) as counter:
        logits, labels = _result(entry, model, batch, length, "plain")
        (_losses(logits, labels).mean() if gate is None else gate.loss(logits, labels)).backward()
    return counter.get_total_flops()


def _result(entry: Entry, model: nn.Module, batch: int, length: int, how: str) -> tuple[Tensor, Tensor]:
    mask = _mask(batch, length)
    if how == "padded":
        assert entry.padded is not None
        logits = entry.padded(model, batch, length, mask)
    else:
        logits = entry.call(model, batch, length)
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
    if how == "padded":
        labels = labels.masked_fill(~mask, -100)
    if how == "sliced":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if how == "float":
        logits = logits.float()
    if how == "reshaped":
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.flatten()
    return logits, labels


def _mask(batch: int, length: int) -> Tensor:
    """(B, T), the last places of every second sequence are padding."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[::2, length - length // 4 :] = False
    return mask


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten(), reduction="none").view(labels.shape)


@torch.no_grad()
def _kept(entry: Entry, plain: nn.Module, unit: str, batch: int, length: int, how: str) -> Tensor:
    """bool: the half with the largest loss of every sequence (B, T), or of the sequences (B,)."""
    logits, labels = _result(entry, plain, batch, length, how)
    each = _losses(logits, labels)
    if unit == "sequence":
        score = each if each.dim() == 1 else (each * (labels >= 0)).sum(1) / (labels >= 0).sum(1)
    else:
        score = each.masked_fill(labels < 0, -1.0)
    score = score if unit == "token" and score.dim() == 2 else score.flatten()[None]
    kept = max(1, round(score.shape[1] * 0.5))
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(kept, 1).indices, True)
    return chosen.flatten() if unit == "sequence" else chosen


def _cut(module: nn.Module, name: str, entry: Entry, batch: int, length: int, how: str, keep: Tensor) -> Any:
    """Cut the output of a layer off at dropped rows."""
    keep_BT = keep.view(batch, -1)
    if how == "sliced":  # the last place is no token of the loss: it stays
        keep_BT = F.pad(keep_BT, (0, 1), value=True)
    flat = torch.cat((keep_BT.flatten(), torch.ones(1, dtype=torch.bool)))

    def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        number = entry.rule(name)(tuple(out.shape[:-1]), batch, length)
        assert number is not None, f"{name}: no rule by hand for rows {tuple(out.shape[:-1])}"
        return torch.where(flat[number].unsqueeze(-1), out, out.detach())

    return module.register_forward_hook(hook)
