"""Weights of which each rank holds a part: what lies here, and how a whole matrix comes together for a moment.

`fully_shard` and `parallelize_module` leave parameters as DTensors. The optimizer works on what lies on its rank, a plain
tensor that shares the DTensor's storage, so its state lives with the shard and is as small.

Shape letters: O output, I input; o and i what of them lies here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from sparse_update.parallel.mesh import MeshError


class Split:
    """The parameters of a model that is cut over ranks, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.like = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def local(self, p: Tensor) -> Tensor:
        """What of a parameter, or of its gradient, lies on this rank; itself where it is whole."""
        return p.to_local() if isinstance(p, DTensor) else p

    def gradient(self, p: Tensor) -> Tensor:
        """What of a parameter's gradient lies on this rank, cut as the parameter is."""
        g = p.grad
        if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements:
            g = g.redistribute(p.device_mesh, p.placements)
        assert g is not None
        return self.local(g)

    def muon(self, leaves: Mapping[str, Tensor], names: Mapping[str, str], **settings: Any) -> GatheredMuon:
        """Muon for parts of matrices, by key; `names` has the parameter of each key."""
        return GatheredMuon(leaves, names, self, **settings)

    def strip(self, name: str, dim: int, start: int, stop: int, tensor: Tensor) -> Tensor:
        """[start, stop) of what lies here, along a dimension that is not cut. Raises MeshError along one that is."""
        if name in self.like and dim in _cut(self.like[name]):
            raise MeshError(f"{name} is cut along dimension {dim} over the processes, and so are its strips: use mesh=ddp")
        return tensor.narrow(dim, start, stop - start)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of what each rank has a part of, (O, I) from (o, i) or from strips of it; on every rank."""
        held = self.held(name, part)
        return held.full_tensor() if isinstance(held, DTensor) else held

    def held(self, name: str, part: Tensor) -> Tensor:
        """The same as a DTensor, which knows the whole's shape; nothing is sent."""
        if name not in self.like:
            return part
        shape = self._shape(name, part)
        like = self.like[name]
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return DTensor.from_local(
            part.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
        )

    def here(self, name: str, whole: Any) -> Tensor:
        """What of a whole tensor lies on this rank; nothing is sent. Of one that is stored, this alone is read."""
        if not isinstance(whole, Tensor):
            found: Tensor = whole.read(box(whole.shape, self.like[name]) if name in self.like else None)
            return found
        if name not in self.like:
            return whole
        like = self.like[name]
        copies = [Replicate()] * like.device_mesh.ndim
        spread = DTensor.from_local(whole.contiguous(), like.device_mesh, copies, run_check=False)
        return spread.redistribute(like.device_mesh, like.placements).to_local()

    @torch.no_grad()
    def load(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Take up whole weights, each rank its part. Raises RuntimeError for names or shapes of another model."""
        wanted = {name: self.shapes.get(name, t.shape) for name, t in model.state_dict().items()}
        found = {name: t.shape for name, t in weights.items()}
        if wanted != found:
            differ = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            raise RuntimeError(f"weights of another model: {', '.join(differ[:3])} differ in name or shape")
        for name, p in model.named_parameters():
            whole = weights[name]
            whole = whole.to(p.device, p.dtype) if isinstance(whole, Tensor) else whole
            self.local(p.detach()).copy_(self.here(name, whole))

    def _shape(self, name: str, part: Tensor) -> torch.Size:
        cut = _cut(self.like[name])
        return torch.Size(self.shapes[name][d] if d in cut else part.shape[d] for d in range(part.dim()))

    def norm(self, gradients: Mapping[str, Iterable[Tensor]]) -> float:
        """Norm of all gradients together, by parameter; parts are added up over the ranks, copies count once."""
        square = torch.zeros((), dtype=torch.float64)
        for name, parts in gradients.items():
            copies = self._copies(name)
            for g in parts:
                square = square + g.detach().double().square().sum().cpu() / copies
        device = next(iter(self.like.values())).to_local().device if self.like else "cpu"
        held = square.to(device)
        dist.all_reduce(held)
        return float(held.sqrt())

    def added(self, value: Tensor) -> Tensor:
        """The sum over all ranks of what each has found in its parts of matrices that lie on no rank twice."""
        device = next(iter(self.like.values())).to_local().device
        held = value.to(device, copy=True)
        dist.all_reduce(held)
        return held.to(value.device)

    def totals(self, found: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Sums over the ranks of what each has found in its part of a parameter, (name, value) -> the whole's, in one
        message; what lies on several ranks counts once."""
        if not found:
            return []
        flat = torch.cat([value.double().flatten() / self._copies(name) for name, value in found])
        parts = self.added(flat).split([value.numel() for _, value in found])
        return [part.view_as(value).to(value.dtype) for part, (_, value) in zip(parts, found, strict=True)]

    def need_rows(self, name: str) -> None:
        """Raise MeshError where the rows of a matrix are divided among the ranks, for what looks at blocks of rows."""
        if name in self.like and 0 in _cut(self.like[name]):
            raise MeshError(
                f"the rows of {name} are divided among the processes, and mask.block_rows makes blocks of them: use "
                "mask.block_rows=0, which takes whole matrices, or mesh=ddp"
            )

    def _copies(self, name: str) -> int:
        """On how many ranks the same part lies."""
        parts = 1
        if name in self.like:
            like = self.like[name]
            for size, place in zip(like.device_mesh.shape, like.placements, strict=True):
                parts *= 1 if place.is_replicate() else size
        return dist.get_world_size() // parts


class GatheredMuon(torch.optim.Muon):
    """torch's Muon for matrices of which each rank holds a part.

    Momentum lives with the part. A direction needs the whole matrix, so one matrix after the other is put together on
    every rank, torch's own Muon makes its direction of it, and the rank moves its part. Every rank computes every
    direction: memory and gradients are divided, this work is not.
    """

    def __init__(self, leaves: Mapping[str, Tensor], names: Mapping[str, str], split: Split, **settings: Any) -> None:
        super().__init__(list(leaves.values()), **settings)
        self.split = split
        self.names = {id(leaf): names[key] for key, leaf in leaves.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                held = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(held, group["momentum"]) if group["nesterov"] else held
                name = self.names[id(p)]
                move = self.split.here(name, _direction(self.split.whole(name, update), group))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=group["lr"])


def _direction(update: Tensor, group: Mapping[str, Any]) -> Tensor:
    """What torch's Muon adds to a matrix, (O, I), at learning rate 1 for a momentum that is given."""
    still = nn.Parameter(torch.zeros_like(update))
    still.grad = update
    kept = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([still], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()
    return still.detach()


def _cut(p: DTensor) -> set[int]:
    """The dimensions that a parameter is cut along; torch's strided shards of a grid say that they are no shards."""
    return {place.dim for place in p.placements if not place.is_replicate()}  # type: ignore[attr-defined]


def box(shape: torch.Size, like: DTensor) -> tuple[slice, ...]:
    """Where in a tensor of this shape, cut as `like` is, the part of this rank lies."""
    start, size = [0] * len(shape), list(shape)
    at = like.device_mesh.get_coordinate()
    assert at is not None
    # What fully_shard cuts of tensor-parallel parts is named first and cut last: torch's strided shards.
    axes = sorted(range(len(at)), key=lambda axis: hasattr(like.placements[axis], "split_factor"))
    for axis in axes:
        if like.placements[axis].is_replicate():
            continue
        dim = like.placements[axis].dim  # type: ignore[attr-defined]
        each = -(-size[dim] // like.device_mesh.size(axis))
        begin = min(at[axis] * each, size[dim])
        start[dim], size[dim] = start[dim] + begin, min(each, size[dim] - begin)
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def pieces(tensors: Mapping[str, Tensor], first: bool) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """`Mesh.pieces` of tensors some of which are DTensors; a part that several ranks hold is the first of theirs."""
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for name, t in tensors.items():
        if not isinstance(t, DTensor):
            if first:
                found[name] = (0,) * t.dim(), t
            continue
        at = t.device_mesh.get_coordinate()
        assert at is not None
        copies = (n for n, place in zip(at, t.placements, strict=True) if place.is_replicate())
        place, local = box(t.shape, t), t.to_local()
        if [s.stop - s.start for s in place] != list(local.shape):
            raise MeshError(f"{name}: the part of shape {tuple(local.shape)} is not where it should lie, {place}")
        if not any(copies) and (local.numel() or (not t.numel() and not any(at))):
            found[name] = tuple(s.start for s in place), local
    return found


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model whose parameters are cut, put together on every rank, one after the other."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
