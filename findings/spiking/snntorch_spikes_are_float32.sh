#!/usr/bin/env bash
# A snnTorch network of double precision fails at its second linear layer: spikes are single precision whatever the model is.
#
# Version: snntorch 1.0.0, torch 2.13.0.
# Expected: after model.double(), and with inputs of float64, all that flows is float64, as in any other torch model. That is how
#     one looks whether a difference to a chip or another simulator is rounding.
# Seen: the membrane is float64, the spikes are float32, and the next nn.Linear raises RuntimeError.
# Output:
#     float64: membrane torch.float64, spikes torch.float32, then RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 snntorch==1.0.0
cd "$folder"
"$venv" -W ignore - <<'END'
import snntorch
import torch
from torch import nn

network = nn.Sequential(nn.Linear(2, 3), snntorch.Leaky(beta=0.9, init_hidden=True), nn.Linear(3, 1)).double()
neuron = snntorch.Leaky(beta=0.9).double()
spikes, membrane = neuron(torch.full((1, 3), 2.0, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
assert spikes.sum() == 3, "the neurons did not spike: the finding does not apply"
try:
    network(torch.ones(1, 2, dtype=torch.float64))
    ended = "no error"
except RuntimeError as error:
    assert "dtype" in str(error), f"another error: {error}"
    ended = "RuntimeError"
print(f"float64: membrane {membrane.dtype}, spikes {spikes.dtype}, then {ended}")
assert (membrane.dtype, spikes.dtype, ended) == (torch.float64, torch.float32, "RuntimeError"), "behaviour changed"
END
