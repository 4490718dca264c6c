"""Shapes of decoder Transformers, and what is counted from them alone: parameters, operations, bytes.

A multiply-accumulate is two operations. "Forward" is one pass; the backward pass of a product is two products of the same
size, one for the input's gradient and one for the weight's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.text import listed, quoted

Pointwise = Literal["compiled", "kernels", "eager"]
POINTWISE: tuple[Pointwise, ...] = ("compiled", "kernels", "eager")
_NORM_BYTES = {"compiled": 4, "kernels": 4, "eager": 32}
_RESIDUAL_BYTES = {"compiled": 4, "kernels": 6, "eager": 6}
_ROTARY_BYTES = {"compiled": 4, "kernels": 20, "eager": 20}
_GATED_BYTES = {"compiled": 6, "kernels": 10, "eager": 10}
_LOSS_BYTES = 28


@dataclass(frozen=True)
class Shape:
    """A decoder Transformer. `mlp` "gated": three matrices, no biases; "plain": two matrices, biases, learned positions."""

    name: str
    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    mlp: str
    tied: bool
    positions: int
    published_parameters: int
    source: str

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def layer_matrices(self) -> int:
        """Weights of one block's matrix products."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width
        return attention + (3 if self.mlp == "gated" else 2) * self.width * self.hidden

    @property
    def layer_parameters(self) -> int:
        """All parameters of one block, with biases and norms."""
        plain = self.mlp == "plain"
        biases = 3 * self.width + 2 * self.kv_width + self.hidden if plain else 0
        return self.layer_matrices + biases + 2 * self.width * (2 if plain else 1)

    @property
    def outside(self) -> int:
        """Parameters that are in no block: embedding, head, positions, last norm."""
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return tables + self.positions * self.width + self.width * (2 if self.mlp == "plain" else 1)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outside

    def layer_flops(self) -> int:
        """Forward operations of one block's products, per token."""
        return 2 * self.layer_matrices

    def attention_flops(self, sequence: int) -> int:
        """Forward operations of one block's attention per token, causal: half of the square."""
        return 2 * sequence * self.width

    def head_flops(self) -> int:
        """Forward operations of the head, per token."""
        return 2 * self.vocabulary * self.width

    def model_flops(self, sequence: int) -> int:
        """Operations of forward and backward per token as MFU counts them: six per parameter outside of the input
        embedding's look-up, and attention over the whole square (PaLM, arXiv 2204.02311, appendix B)."""
        looked_up = 0 if self.tied else self.vocabulary * self.width
        return 6 * (self.parameters - looked_up) + 12 * self.layers * self.width * sequence

    def pointwise_bytes(self, style: Pointwise) -> int:
        """Bytes that one block's elementwise operations read and write per token, forward, activations in bf16.

        "kernels": a kernel each for norm, residual, rotation, activation and gate, each reading its operands and writing
        its result; "eager": the norm in float32, one operation after the other, as well; "compiled": neighbours fused.
        """
        norms = 2 * _NORM_BYTES[style] * self.width + 2 * _RESIDUAL_BYTES[style] * self.width
        if self.mlp == "plain":
            return norms + 4 * self.hidden
        return norms + _ROTARY_BYTES[style] * (self.width + self.kv_width) + _GATED_BYTES[style] * self.hidden

    def loss_bytes(self) -> int:
        """Bytes of logits read and written per token, forward and backward: cast, log-softmax and gradient in float32."""
        return _LOSS_BYTES * self.vocabulary

    def kept_bytes(self) -> int:
        """Bytes of activations that one block keeps for its backward pass per token, bf16, attention fused: the inputs of
        norms, products and elementwise operations, and a float32 per head (arXiv 2205.05198 counts the same)."""
        hidden = (3 if self.mlp == "gated" else 2) * self.hidden
        return 2 * (6 * self.width + 2 * self.kv_width + hidden) + 4 * self.heads


@cache
def shapes() -> Mapping[str, Shape]:
    """Name -> shape of every shipped one.

    Raises:
        DataFileError: the shipped file is damaged.
    """
    where, entry = datafile.opened("decoders", "shapes", ("mlp", "shapes"))
    return {name: _shape(f"{where}: {name}", name, raw) for name, raw in entry["shapes"].items()}


def load_shape(name: str) -> Shape:
    """The shipped shape of that name. Raises DataFileError for another name; the message lists them."""
    if name not in shapes():
        raise DataFileError(f"shape {quoted(name)} is not known; shipped: {listed(shapes())}")
    return shapes()[name]


def _shape(where: str, name: str, raw: Any) -> Shape:
    counts = ("layers", "width", "hidden", "heads", "kv_heads", "vocabulary", "positions", "parameters")
    entry = datafile.check_keys(where, raw, (*counts, "mlp", "tied", "source"))
    numbers = {key: int(datafile.number(f"{where}: {key}", entry[key])) for key in counts}
    published = numbers.pop("parameters")
    mlp = datafile.choice(f"{where}: mlp", entry["mlp"], ("gated", "plain"))
    source = datafile.text(f"{where}: source", entry["source"])
    return Shape(name, mlp=mlp, tied=bool(entry["tied"]), published_parameters=published, source=source, **numbers)
