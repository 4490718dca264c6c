#!/usr/bin/env bash
# A compiled module behind one that tensor parallel has cut fails in its backward.
#
# Version: torch 2.13.0.
# Expected: compiling one block of a model after parallelize_module, as one compiles any other module, changes no result.
# Seen: RowwiseParallel gives back an AsyncCollectiveTensor, a sum over processes that is still under way, whose type its
#     use in eager mode hides. The compiled module's forward is right, and the backward raises AttributeError ("'Tensor'
#     object has no attribute '_local_tensor'"), which names neither. x.clone() between the two is enough, and so is to
#     compile both together.
# Output:
#     eager: loss 14.913, gradient 25.392
#     rest compiled: loss 14.913, backward AttributeError
#     rest compiled, x.clone() before it: loss 14.913, gradient 25.392
#     both compiled together: loss 14.913, gradient 25.392
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > two.py <<'END'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
tokens = torch.arange(8)
found = {}
for mode in ("eager", "rest compiled", "rest compiled, x.clone() before it", "both compiled together"):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "rest": nn.Linear(4, 4)})
    parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate())})
    rest = torch.compile(model["rest"], backend="aot_eager") if mode.startswith("rest") else model["rest"]

    def forward(t):
        x = model["embed"](t)
        return rest(x.clone() if "clone" in mode else x)

    run = torch.compile(forward, backend="aot_eager") if mode.startswith("both") else forward
    loss = run(tokens).square().sum()
    try:
        loss.backward()
    except AttributeError:
        found[mode] = f"loss {loss.item():.3f}, backward AttributeError"
        continue
    gradient = model["embed"].weight.grad.full_tensor().square().sum()
    found[mode] = f"loss {loss.item():.3f}, gradient {gradient.item():.3f}"
if dist.get_rank() == 0:
    print("\n".join(f"{mode}: {text}" for mode, text in found.items()), flush=True)
right = found["eager"]
assert found["rest compiled"].endswith("AttributeError"), "behaviour changed: the backward runs"
assert found["rest compiled, x.clone() before it"] == found["both compiled together"] == right
END
OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore "$venv" -m torch.distributed.run --standalone --nproc-per-node 2 two.py
