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


def trained(rest_of, whole_of=lambda f: f):
    """Loss, and the squared norm of the embedding's gradient or what its backward raised."""
    torch.manual_seed(0)
    embed, rest = nn.Embedding(8, 4), nn.Linear(4, 4)
    parallelize_module(embed, mesh, RowwiseParallel(input_layouts=Replicate()))
    run = rest_of(rest)
    loss = whole_of(lambda tokens: run(embed(tokens)))(torch.arange(8)).square().sum()
    try:
        loss.backward()
    except AttributeError:
        return f"loss {loss.item():.3f}, backward AttributeError"
    return f"loss {loss.item():.3f}, gradient {embed.weight.grad.full_tensor().square().sum().item():.3f}"


def compiled(f):
    return torch.compile(f, backend="aot_eager")


def cloned(rest):
    run = compiled(rest)
    return lambda x: run(x.clone())


found = {
    "eager": trained(lambda rest: rest),
    "rest compiled": trained(compiled),
    "rest compiled, x.clone() before it": trained(cloned),
    "both compiled together": trained(lambda rest: rest, compiled),
}
if dist.get_rank() == 0:
    print("\n".join(f"{name}: {text}" for name, text in found.items()))
right = found["eager"]
assert found["rest compiled"].endswith("AttributeError"), "behaviour changed: the backward runs"
assert found["rest compiled, x.clone() before it"] == found["both compiled together"] == right
dist.barrier()
dist.destroy_process_group()
END
OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore "$venv" -m torch.distributed.run --standalone --nproc-per-node 2 two.py
