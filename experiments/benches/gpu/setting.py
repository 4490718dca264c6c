"""What a part of `bench gpu` is given, and the sizes that it runs at: GPT-2 small's on a GPU, a toy's in a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from experiments.benches.gate import load_model
from sparse_update.transformer import ModelConfig

VOCABULARY = 50_304
"""GPT-2's 50,257 tokens, up to the next multiple of 128, as nanoGPT pads it."""
PEAK_BF16_TFLOPS = (("H200", 989.4), ("H100", 989.4), ("A100", 312.0))
"""Dense bf16 rate of the SXM boards whose name holds the text (NVIDIA's data sheets of H100 and H200 SXM and of A100). A
PCIe board has less: its utilisation comes out too low here."""

Emit = Callable[[dict[str, Any]], None]
"""Hands on what a part has found so far; the parent keeps it when the part is stopped at its limit."""


@dataclass(frozen=True)
class Setting:
    """Where and at which size a part runs.

    Attributes:
        device: torch's name, "cuda" or, in a dry run, "cpu".
        toy: toy sizes and one round: a dry run.
        compiled: torch.compile for the steps.
        seconds: until its limit; a part plans with it.
    """

    device: str
    toy: bool
    compiled: bool
    seconds: float

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def precision(self) -> str:
        """bf16 on the GPU; fp32 in a dry run, since most CPUs emulate bf16."""
        return "fp32" if self.toy else "bf16"

    def model(self) -> ModelConfig:
        """GPT-2 small's shape (124 M parameters), or a toy's."""
        if self.toy:
            return ModelConfig(name="toy", width=32, layers=3, heads=2, context=32, vocab_size=64)
        return load_model("base", VOCABULARY)

    @property
    def batch(self) -> int:
        """Windows in a dense step."""
        return 4 if self.toy else 16

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)


def peak_flops_per_s(name: str) -> float | None:
    """bf16 FLOP/s of a GPU by its name, from its data sheet; None for one that is not in the list."""
    return next((1e12 * peak for part, peak in PEAK_BF16_TFLOPS if part in name), None)
