"""Turn a residual stream to axes in which it is sparse: the same function, computed with fewer and larger values.

A Transformer whose norms are RMSNorm does not change when its residual stream is turned by an orthogonal R, once the
norms' gains are folded into the layers behind them (Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024): the norm of x R
is the norm of x times R, what reads the stream takes W R, what writes to it R^T W. There it serves to drop axes; here
R is chosen so that thresholds drop many small values and lose little: it minimises the mean |x R|, from the principal
axes on. Values of an attention head can be turned between v and o in the same way.

    stream = Stream(sources=[embed], writers=[o, fc2], readers=[(norm1, [q, k, v]), (norm2, [fc1]), (norm, [head])])
    R = sparse_axes(samples)                   # of normalised rows
    stream.turn(R)

Shape letters: N rows, D stream width; K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def principal_axes(x_ND: Tensor) -> Tensor:
    """Orthogonal (D, D): eigenvectors of x^T x as columns, the largest first."""
    _, vectors = torch.linalg.eigh(x_ND.double().T @ x_ND.double())
    return vectors.flip(1).to(x_ND.dtype)


def sparse_axes(x_ND: Tensor, *, steps: int = 400, rows: int = 2048, lr: float = 0.02, seed: int = 0) -> Tensor:
    """Orthogonal (D, D) that makes mean |x R| small: Adam on the exponential of a skew matrix, from the principal axes.

    Args:
        x_ND: rows to judge by, more than D. steps, rows: length of the search, rows drawn per step. seed: of the draw.

    Raises ValueError for fewer rows than axes or values that are not finite.
    """
    if x_ND.dim() != 2 or len(x_ND) < x_ND.shape[1] or not bool(torch.isfinite(x_ND).all()):
        raise ValueError(f"samples are {tuple(x_ND.shape)}; finite rows, at least as many as channels, are needed")
    start = principal_axes(x_ND)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    free = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            picked = torch.randint(len(x_ND), (min(rows, len(x_ND)),), generator=generator).to(x_ND.device)
            size = (x_ND[picked] @ (start @ torch.matrix_exp(free - free.T))).abs().mean()
            optimizer.zero_grad()
            size.backward()
            optimizer.step()
            schedule.step()
    turned = start.double() @ torch.matrix_exp((free - free.T).detach().double())
    return turned.to(x_ND.dtype)


@dataclass(frozen=True)
class Stream:
    """Who touches a residual stream of width D.

    `sources`: embeddings that start it (weights (vocabulary, D)); `writers`: linear layers that add to it; `readers`:
    every norm on it with the linear layers that read the norm's output, and nothing else does.
    """

    sources: Sequence[nn.Embedding]
    writers: Sequence[nn.Linear]
    readers: Sequence[tuple[nn.Module, Sequence[nn.Linear]]]

    @torch.no_grad()
    def turn(self, axes_DD: Tensor) -> None:
        """Turn the stream in place; outputs stay what they were, up to rounding.

        Raises ValueError for axes that are not orthogonal, a norm with a bias or that subtracts a mean, or weights
        that two of the modules share (tied embeddings): they would have to be turned twice.
        """
        weights = [m.weight for m in (*self.sources, *self.writers, *(r for _, rs in self.readers for r in rs))]
        if len({id(w) for w in weights}) != len(weights):
            raise ValueError("two modules of the stream share one weight (tied embeddings); give each its own first")
        width, turned = axes_DD.shape[0], axes_DD.detach().double().cpu()
        if turned.shape != (width, width) or (turned.T @ turned - torch.eye(width).double()).abs().max() > 1e-4:
            raise ValueError(f"axes of shape {tuple(axes_DD.shape)} are not orthogonal")
        for norm, _ in self.readers:
            if isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None:
                raise ValueError(
                    f"{type(norm).__name__} subtracts a mean or adds a bias; only RMSNorm commutes with a turn"
                )
        for source in self.sources:
            source.weight.copy_(_product(source.weight, axes_DD))
        for writer in self.writers:
            writer.weight.copy_(_product(axes_DD.T, writer.weight))
            if writer.bias is not None:
                writer.bias.copy_(_product(writer.bias[None], axes_DD)[0])
        for norm, readers in self.readers:
            gain_D: Tensor = norm.weight  # type: ignore[assignment]
            for reader in readers:
                reader.weight.copy_(_product(reader.weight * gain_D, axes_DD))
            gain_D.fill_(1.0)


@torch.no_grad()
def turn_heads(v: nn.Linear, o: nn.Linear, axes: Sequence[Tensor]) -> None:
    """Turn the values of every head, (K, K) each, between `v`, which makes them, and `o`, which reads their averages."""
    width = axes[0].shape[0]
    if len(axes) * width != v.out_features or v.out_features != o.in_features:
        raise ValueError(f"{len(axes)} heads of {width} do not fit {v.out_features} values and {o.in_features} inputs")
    for h, axes_KK in enumerate(axes):
        part = slice(h * width, (h + 1) * width)
        v.weight[part] = _product(axes_KK.T, v.weight[part])
        if v.bias is not None:
            v.bias[part] = _product(v.bias[None, part], axes_KK)[0]
        o.weight[:, part] = _product(o.weight[:, part], axes_KK)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().to(a.device)).to(b.dtype)
