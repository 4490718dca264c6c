"""Parts of phases and of batches, and several phases as one.

Shape letters: P prompts, R outputs, T predicted tokens of a prompt with its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.gates.gate import GatedBatch
from sparse_update.objectives.phase import Phase

ROWS = ("tokens_RT1", "logp_RT", "drawn_RT", "entropy_RT")


def picked(batch: GatedBatch, index_P: Tensor) -> GatedBatch:
    """Some windows of a batch, int64 places (P,), in that order."""
    found: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    some: dict[str, Any] = {name: None if value is None else value[index_P] for name, value in found.items()}
    return GatedBatch(**some)


def with_prompts(phase: Phase, index_P: Tensor) -> Phase:
    """The phase with some of its prompts, ascending int64 places (P,), numbered anew."""
    place = torch.full((len(phase),), -1, dtype=torch.int64)
    place[index_P] = torch.arange(len(index_P))
    rows_R = (place[phase.prompt_R] >= 0).nonzero()[:, 0]
    found = {f.name: getattr(phase, f.name)[rows_R] for f in fields(phase) if f.name not in ("batch", "taken", "more")}
    found["prompt_R"] = place[found["prompt_R"]]
    more = {name: value[rows_R] for name, value in phase.more.items()}
    return replace(phase, batch=picked(phase.batch, index_P), more=more, **found)


def joined(phases: Sequence[Phase]) -> Phase:
    """Several phases as one, prompts in that order; rows are as long as the longest. What objectives keep is dropped."""
    phases = [phase for phase in phases if len(phase)]
    longest = max(phase.tokens_RT1.shape[1] for phase in phases)
    before = 0
    parts: list[dict[str, Tensor]] = []
    for phase in phases:
        part = {f.name: getattr(phase, f.name) for f in fields(phase) if f.name not in ("batch", "taken", "more")}
        for name in ROWS:
            part[name] = F.pad(part[name], (0, longest - phase.tokens_RT1.shape[1]))
        part["prompt_R"] = part["prompt_R"] + before
        before += len(phase)
        parts.append(part)
    found: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    batches = [phase.batch for phase in phases]
    batch: dict[str, Any] = {}
    for f in fields(batches[0]):
        values = [getattr(one, f.name) for one in batches]
        batch[f.name] = None if values[0] is None else torch.cat(values)
    return Phase(batch=GatedBatch(**batch), **found)
