#!/usr/bin/env bash
# To be read by norse and snnTorch alike, a NIR LIF neuron needs r = 1, and a CubaLIF neuron must not have r = 1.
#
# Version: nir 1.0.8, nirtorch 2.6, norse 1.1.0, snntorch 1.0.0.
# Expected: r is a free parameter of both nodes: r and the weights in front of it may be scaled against each other, and a
#     reader gives the same spikes. A reader that wants a certain r wants the same for both nodes.
# Seen: norse takes r of a LIF node for 1, whatever it is (a line on stderr asks to read the documentation): the file that
#     snnTorch writes, with r = tau/dt, hardly spikes there. For CubaLIF it is the other way round: snnTorch reads only
#     r = tau_mem/dt and stops with an AssertionError at r = 1, while norse reads both.
#     Portable are LIF with r = 1 and weights times tau/dt, and CubaLIF with r = tau_mem/dt and w_in = tau_syn/dt.
# Output (spikes of 16 neurons in 50 steps):
#     LIF, r = 1: snntorch 254, norse 254
#     LIF, r = tau/dt: snntorch 254, norse 10
#     CubaLIF, r = 1: snntorch AssertionError, norse 444
#     CubaLIF, r = tau/dt: snntorch 444, norse 444
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 snntorch==1.0.0 \
    nir==1.0.8 nirtorch==2.6
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps norse==1.1.0
cd "$folder"
"$venv" - <<'END'
import contextlib
import io
import logging
import warnings

import nir
import norse.torch
import numpy as np
import torch
from snntorch.import_nir import import_from_nir

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
DT, TAU, N = 1e-4, 1e-3, 16
draw = np.random.default_rng(0)
weight = draw.normal(0, 0.6, (N, 8)).astype(np.float32)
x = torch.tensor(draw.random((50, 8)), dtype=torch.float32)
one = np.ones(N, dtype=np.float32)


def graph(kind, scaled):
    # The same network twice: the scale stands in r (and w_in), or in the weights.
    each = {"r": one * (TAU / DT if scaled else 1), "v_leak": 0 * one, "v_threshold": one, "v_reset": 0 * one}
    if kind == "LIF":
        neuron, scale = nir.LIF(tau=TAU * one, **each), TAU / DT
    else:
        w_in = one * (TAU / 2 / DT if scaled else 1)
        neuron = nir.CubaLIF(tau_mem=TAU * one, tau_syn=TAU / 2 * one, w_in=w_in, **each)
        scale = TAU / DT * TAU / 2 / DT
    nodes = {
        "input": nir.Input({"input": np.array([8])}),
        "weights": nir.Linear(weight * (1 if scaled else scale)),
        "neurons": neuron,
        "output": nir.Output({"output": np.array([N])}),
    }
    return nir.NIRGraph(nodes, [("input", "weights"), ("weights", "neurons"), ("neurons", "output")])


def run(net, x):
    state, spikes = None, []
    for value in x:
        value, state = net(value) if state is None else net(value, state)
        spikes.append((value[0] if isinstance(value, tuple) else value).detach().flatten())
    return torch.stack(spikes)


def read_snntorch(made):
    return run(import_from_nir(made), x)


def read_norse(made):
    net, state, spikes = norse.torch.from_nir(made, dt=DT), None, []
    for value in x:
        out, state = net(value[None], state)
        spikes.append(out.detach().flatten())
    return torch.stack(spikes)


def spikes(reader, made):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return int(reader(made).sum())
    except AssertionError:
        return "AssertionError"


found = {}
for kind in ("LIF", "CubaLIF"):
    for scaled in (False, True):
        found[kind, scaled] = pair = [spikes(reader, graph(kind, scaled)) for reader in (read_snntorch, read_norse)]
        print(f"{kind}, r = {'tau/dt' if scaled else '1'}: snntorch {pair[0]}, norse {pair[1]}")
lif, cuba = found["LIF", False], found["CubaLIF", True]
assert lif[0] == lif[1] == found["LIF", True][0] > 0, "behaviour changed: snnTorch reads the two LIF files differently"
assert found["LIF", True][1] < lif[1] / 10, "behaviour changed: norse reads r of a LIF node"
assert cuba[0] == cuba[1] == found["CubaLIF", False][1] > 0, "behaviour changed: norse reads the CubaLIF files differently"
assert found["CubaLIF", False][0] == "AssertionError", "behaviour changed: snnTorch reads a CubaLIF with r = 1"
END
