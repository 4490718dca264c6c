#!/usr/bin/env bash
# sinabs takes a NIR time constant, which is in seconds, for a number of time steps.
#
# Version: sinabs 3.1.3, nir 1.0.4 (the newest that sinabs allows), nirtorch 2.0.2.
# Expected: a LIF node with tau = 0.01, a membrane of 10 ms, loses a tenth of its charge in a step of 1 ms. A reader needs a
#     step for that, as norse's from_nir(dt=...) does.
# Seen: from_nir has no step. tau is used as it is, as if 0.01 were a hundredth of a step: the neuron forgets everything
#     at once, e^(-100) of its charge is left. Its exporter writes steps in the same place, so sinabs reads its own files
#     well and everybody else's as networks without memory. Nothing is raised.
# Output:
#     tau = 0.01: membrane 1.0, 0.0, 0.0
#     tau = 10: membrane 1.0, 0.904837, 0.818731
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 nir==1.0.4 \
    nirtorch==2.0.2 pbr==7.1.3 matplotlib==3.11.2
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps sinabs==3.1.3
cd "$folder"
"$venv" - <<'END'
import math
import warnings

import nir
import numpy as np
import torch
from sinabs.nir import from_nir

warnings.simplefilter("ignore")


def membrane(tau):
    one = np.ones(1, dtype=np.float32)
    nodes = {
        "input": nir.Input({"input": np.array([1])}),
        "neuron": nir.LIF(tau=tau * one, r=one, v_leak=0 * one, v_threshold=1000 * one),
        "output": nir.Output({"output": np.array([1])}),
    }
    nir.write("net.nir", nir.NIRGraph(nodes, [("input", "neuron"), ("neuron", "output")]))
    net = from_nir(nir.read("net.nir"), batch_size=1)
    (neuron,) = (module for module in net.modules() if hasattr(module, "tau_mem"))
    values = []
    for value in (1.0, 0.0, 0.0):  # one impulse
        net(torch.full((1, 1), value))
        values.append(float(neuron.v_mem.detach()))
    return values


for tau in (0.01, 10):
    found = membrane(tau)
    print(f"tau = {tau}: membrane", ", ".join(str(round(value, 6)) for value in found))
    right = all(math.isclose(value, math.exp(-step / tau), abs_tol=1e-5) for step, value in enumerate(found))
    assert right, f"behaviour changed: tau = {tau} is not taken for steps"
END
