#!/usr/bin/env bash
# snnTorch writes an integrate-and-fire neuron to NIR with an infinite time constant, and reads it back as a dead one.
#
# Version: snntorch 1.0.0, nir 1.0.8, nirtorch 2.6.
# Expected: Leaky(beta=1) keeps its whole charge. NIR has a node for that, IF, so it is written as an IF node, or refused.
# Seen: it becomes a LIF node with tau = inf and r = inf. The file is valid. snnTorch's own importer scales the weights by
#     r/tau, which is not a number, and the network never spikes again.
# Output:
#     written: LIF, tau inf, r inf
#     spikes 91, after the round trip 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 snntorch==1.0.0 \
    nir==1.0.8 nirtorch==2.6
cd "$folder"
"$venv" - <<'END'
import contextlib
import io
import warnings

import nir
import numpy as np
import snntorch
import torch
from snntorch.export_nir import export_to_nir
from snntorch.import_nir import import_from_nir
from torch import nn

warnings.simplefilter("ignore")  # numpy's "divide by zero" is all that is said


def run(net, x):
    state, spikes = None, []
    for value in x:
        value, state = net(value) if state is None else net(value, state)
        spikes.append((value[0] if isinstance(value, tuple) else value).detach().flatten())
    return torch.stack(spikes)


torch.manual_seed(0)
neuron = snntorch.Leaky(beta=torch.ones(16), threshold=torch.ones(16), reset_mechanism="zero", init_hidden=True)
model = nn.Sequential(nn.Linear(8, 16), neuron)
x = torch.rand(50, 8)
before = int(torch.stack([model(value[None])[0] for value in x]).sum())
with contextlib.redirect_stdout(io.StringIO()):
    nir.write("net.nir", export_to_nir(model, x[0]))
    graph = nir.read("net.nir")
    after = int(run(import_from_nir(graph), x).sum())
(node,) = (node for node in graph.nodes.values() if isinstance(node, (nir.LIF, nir.IF)))
print(f"written: {type(node).__name__}, tau {node.tau[0]}, r {node.r[0]}")
print(f"spikes {before}, after the round trip {after}")
assert isinstance(node, nir.LIF) and np.isinf(node.tau).all(), "behaviour changed: another node is written"
assert before > 0 and after == 0, "behaviour changed: the network that is read back spikes"
END
