"""The processes of one training run, as this one of them sees it: which rank it is, and how the ranks meet.

torchrun (or whatever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) has started them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from experiments.runs.folder import RunError
from experiments.runs.hydra_app import ConfigError
from hardware.text import short
from sparse_update.parallel.make import make_mesh
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.settings import MeshConfig
from sparse_update.parallel.single import ALONE


def started_ranks() -> int:
    """How many processes torchrun has started; 0 where this one was started alone."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 0


def is_first() -> bool:
    """Whether this process reports: rank 0, or one that was started alone."""
    return int(os.environ.get("RANK", "0")) == 0 or not started_ranks()


def rank_device(device: torch.device) -> torch.device:
    """`device`, or this rank's own GPU of its machine."""
    if device.type != "cuda" or device.index is not None or not started_ranks():
        return device
    mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(mine)
    return mine


def backend_of(cfg: MeshConfig, device: torch.device) -> str:
    """ "nccl" or "gloo". Raises ConfigError for NCCL without a GPU."""
    if cfg.backend == "nccl" and device.type != "cuda":
        raise ConfigError("mesh.backend = nccl needs trainer.device = cuda: on a CPU use mesh.backend=gloo, or auto")
    return ("nccl" if device.type == "cuda" else "gloo") if cfg.backend == "auto" else cfg.backend


@contextmanager
def joined(cfg: MeshConfig, device: torch.device) -> Iterator[Mesh]:
    """The mesh of this run, joined while it is entered.

    Raises ConfigError where the processes that were started do not make the mesh that is asked for, and RunError, with its
    name, for a rank that died or did not answer within `cfg.timeout_s` seconds.
    """
    ranks = started_ranks()
    if cfg.kind == "single":
        if ranks > 1:
            raise ConfigError(f"torchrun has started {ranks} processes and mesh is single: add mesh=ddp, fsdp or tp")
        yield ALONE
        return
    if ranks < 2:
        raise ConfigError(
            f"mesh={cfg.kind} needs several processes: mesh.processes=N starts them on this machine, "
            "torchrun --nproc-per-node N -m experiments.train ... on one or several"
        )
    try:
        cfg.grid(ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if cfg.processes not in (0, ranks) and int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        raise ConfigError(f"mesh.processes = {cfg.processes}, but torchrun has started {ranks}: leave mesh.processes out")
    _meet(backend_of(cfg, device), ranks, timedelta(seconds=cfg.timeout_s))
    try:
        yield make_mesh(cfg, device)
    except RuntimeError as error:
        if lost := _without_a_word(error, ranks):
            names = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
            raise RunError(
                f"{names} of {ranks} {LOST_RANK}: a collective did not end (mesh.timeout_s = {cfg.timeout_s:g}; "
                f"{short(str(error))}). What was saved is in the run's folder: the same command goes on"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _meet(backend: str, ranks: int, timeout: timedelta) -> None:
    """Make the default process group, in a part of torchrun's store that is this start's own.

    Where torchrun starts ranks again, its store still has the addresses of those before (torch 2.13.0), and a rank that
    comes up first may call one that is gone.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or start == "0":
        dist.init_process_group(backend, timeout=timeout)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"start/{start}", dist.TCPStore(address, port, ranks, is_master=False, timeout=timeout))
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=ranks, timeout=timeout)


LOST_RANK = "died or hangs"
ANSWER_S = 10.0
"""Ranks that wait for the same one give up at about the same time."""
LOST = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "connection refused")


def _without_a_word(error: RuntimeError, ranks: int) -> list[int]:
    """Ranks that do not say that a collective has failed for them too; none where it is another error, or all say so.

    They say it through the store by which torchrun lets ranks meet, which its agent keeps.
    """
    if not any(words in str(error).lower() for words in LOST):
        return []
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = [f"spikegate/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}" for rank in range(ranks)]
        store.set(keys[dist.get_rank()], "1")
        deadline = time.monotonic() + ANSWER_S
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # the store is gone as well
        return []


def mesh_record(cfg: MeshConfig, mesh: Mesh, device: torch.device) -> dict[str, Any]:
    """What a run's record says of the processes that trained it."""
    data, tensor = cfg.grid(mesh.size) if mesh.size > 1 else (1, 1)
    backend = backend_of(cfg, device) if mesh.size > 1 else None
    return {"kind": mesh.kind, "world_size": mesh.size, "data": data, "tensor": tensor, "backend": backend}
