#!/usr/bin/env bash
# A parameter that tensor parallel and fully_shard both cut along its rows has a placement that says it is no shard.
#
# Version: torch 2.13.0.
# Expected: p.placements has one entry for each axis of the mesh, and each is a shard, a replica or a partial sum. Who adds
#     up something over the parts of a parameter, such as a gradient's norm, divides by the number of copies: the product
#     of the axes whose placement.is_shard() is False.
# Seen: with ColwiseParallel on the tensor axis and fully_shard on the data axis, the data axis has a _StridedShard, whose
#     is_shard(), is_replicate() and is_partial() are all False. Every rank holds another quarter of the rows, and a norm
#     that counts copies so is too small by the root of 2. Nothing raises. The rows do not lie as [Shard(0), Shard(0)] lays
#     them either: two of four ranks hold others. torch's own full_tensor(), clip_grad_norm_ and distribute_tensor with
#     these placements are right.
# Output:
#     0.weight: placements say shard [False, True], replica [False, False], partial [False, False]
#     norm of its gradient: 22.63, by copies: 16.00, by torch: 22.63
#     ranks whose rows are those of [Shard(0), Shard(0)]: [0, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > four.py <<'END'
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

logging.disable(logging.WARNING)  # that it gathers in two steps
torch.set_num_threads(1)
dist.init_process_group("gloo")
grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False))
whole = model[0].weight.detach().clone()
nn.init.ones_(model[1].weight)
parallelize_module(model, grid["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
fully_shard(model, mesh=grid["data"])
p = model[0].weight
model(torch.ones(1, 4)).sum().backward()

kinds = {k: [getattr(at, f"is_{k}")() for at in p.placements] for k in ("shard", "replicate", "partial")}
square = p.grad.to_local().square().sum()
dist.all_reduce(square)
copies = 1
for size, at in zip(grid.shape, p.placements):
    copies *= 1 if at.is_shard() else size
whole_norm = float(p.grad.full_tensor().norm())
by_torch = float(nn.utils.get_total_norm([p.grad]).full_tensor())
by_copies = float((square / copies).sqrt())
plain = distribute_tensor(whole, grid, [Shard(0), Shard(0)]).to_local()
alike = [None] * 4
dist.all_gather_object(alike, bool(torch.equal(plain, p.to_local().detach())))
if dist.get_rank() == 0:
    print(f"0.weight: placements say shard {kinds['shard']}, replica {kinds['replicate']}, partial {kinds['partial']}")
    print(f"norm of its gradient: {whole_norm:.2f}, by copies: {by_copies:.2f}, by torch: {by_torch:.2f}")
    print(f"ranks whose rows are those of [Shard(0), Shard(0)]: {[r for r, same in enumerate(alike) if same]}")
assert torch.equal(p.full_tensor().detach(), whole)
assert kinds == {"shard": [False, True], "replicate": [False, False], "partial": [False, False]}, f"behaviour changed: {kinds}"
assert abs(by_torch - whole_norm) < 1e-4 and abs(by_copies - whole_norm / 2**0.5) < 1e-4, "behaviour changed: the norm"
assert alike == [True, False, False, True], f"behaviour changed: {alike}"
dist.barrier()
dist.destroy_process_group()
END
OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore "$venv" -m torch.distributed.run --standalone --nproc-per-node 4 four.py
