"""The ranks of torch.distributed: reductions that every kind of mesh shares, and DistributedDataParallel.

The backend is a setting: gloo on CPUs, NCCL on GPUs. Nothing here knows which of them it is but where tensors must lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_update.parallel.mesh import Mesh

BUCKET_BYTES = 25 << 20
"""Gradients that are reduced together, at most; DistributedDataParallel's own size."""


class Ranks(Mesh):
    """The processes of torch.distributed's default group, all of them with windows of their own.

    Args:
        device: where this process computes.
    """

    kind = "ddp"
    timeout: timedelta | None = None
    """of messages beside training; None: torch's own"""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.data: Any = dist.group.WORLD
        """the group whose members see different windows"""
        self._wrapped: nn.parallel.DistributedDataParallel | None = None

    def average_(self, gradients: Iterable[Tensor]) -> None:
        """Sums over the shards, in buckets, each divided by their number."""
        bucket: list[Tensor] = []
        held = 0
        for gradient in gradients:
            if bucket and (held + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
                self._average_bucket(bucket)
                bucket, held = [], 0
            bucket.append(gradient)
            held += gradient.nbytes
        if bucket:
            self._average_bucket(bucket)

    def _average_bucket(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in bucket]).div_(self.shards)  # DDP's order: division, then the sum
        dist.all_reduce(flat, group=self.data)
        start = 0
        for gradient in bucket:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def gather(self, part: Tensor) -> Tensor:
        here = part.to(self.device).contiguous()
        as_bytes = here.dtype == torch.bool
        sent = here.to(torch.uint8) if as_bytes else here
        whole = sent.new_empty((self.shards * len(sent), *sent.shape[1:]))
        dist.all_gather(list(whole.chunk(self.shards)), sent, group=self.data)
        return (whole.bool() if as_bytes else whole).to(part.device)

    def sum(self, value: float) -> float:
        found = self._reduced(value, dist.ReduceOp.SUM)
        return round(found) if isinstance(value, int) else found

    def largest(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: float, op: Any) -> float:
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(held, op)
        return float(held)

    def wait(self) -> None:
        dist.barrier()

    def said_by_first(self, text: str) -> str:
        data = text.encode()
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, 0)
        held = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first:
            held.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(held, 0)
        return bytes(held.cpu().tolist()).decode()

    def said_by_all(self, text: str) -> list[str]:
        return self._told(text, None, self.device)

    def beside(self) -> Callable[[str], list[str]]:
        group = dist.new_group(backend="gloo", timeout=self.timeout)
        return lambda text: self._told(text, group, torch.device("cpu"))

    def _told(self, text: str, group: Any, device: torch.device) -> list[str]:
        data = text.encode()
        most = torch.tensor([len(data)], dtype=torch.int64, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        room = int(most) + 8
        mine = torch.zeros(room, dtype=torch.uint8)
        mine[:8] = torch.tensor(list(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        if data:
            mine[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        all_of = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in range(self.size)]
        dist.all_gather(all_of, mine.to(device), group=group)
        told = [bytes(one.cpu().tolist()) for one in all_of]
        return [one[8 : 8 + int.from_bytes(one[:8], "little")].decode() for one in told]

    def module(self, model: nn.Module) -> nn.Module:
        if self._wrapped is None:
            place = [self.device.index or 0] if self.device.type == "cuda" else None
            with warnings.catch_warnings():  # torch 2.13 has another name for the option, which older ones do not know
                warnings.simplefilter("ignore", FutureWarning)
                self._wrapped = nn.parallel.DistributedDataParallel(model, device_ids=place, broadcast_buffers=False)
        return self._wrapped

    @contextmanager
    def silent(self, quiet: bool = True) -> Iterator[None]:
        if not quiet or self._wrapped is None:
            yield
            return
        with self._wrapped.no_sync():
            yield
