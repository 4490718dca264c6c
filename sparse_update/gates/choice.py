"""Which gate a unit means."""

from __future__ import annotations

from typing import Any

from sparse_update.gates.config import BEFORE, GateConfig
from sparse_update.gates.deciding.auto import AutoGate
from sparse_update.gates.gate import Gate, GateContext
from sparse_update.gates.rows import BypassGate, RowGate
from sparse_update.gates.sampling import GradientGate, SubblockGate, VcasGate
from sparse_update.gates.windows import WindowGate

KINDS: dict[str, type[Gate]] = {
    "none": Gate,
    **dict.fromkeys(BEFORE, WindowGate),
    **dict.fromkeys(("sequence_after", "token", "token_exact"), RowGate),
    "bypass": BypassGate,
    "dw_rows": GradientGate,
    "gradient": VcasGate,
    "subblock": SubblockGate,
    "auto": AutoGate,
}


def make_gate(cfg: GateConfig, stream: Any, context: GateContext) -> Gate:
    """The gate of `cfg.unit`. Raises SignalError for a signal that lacks what it needs (a reference, known text)."""
    return KINDS[cfg.unit](cfg, stream, context)
