#!/usr/bin/env bash
# After a spike, snnTorch's Synaptic and RLeaky lose the next input; its Leaky, with the same settings, keeps it.
#
# Version: snntorch 1.0.0, reset_mechanism="zero" and the default reset_delay=True.
# Expected: the same reset in each kind of neuron. Synaptic without synaptic memory and RLeaky without recurrence compute
#     what Leaky computes.
# Seen: Leaky sets the old membrane to zero and adds the input of the step. The others set the sum of both to zero, so that the
#     input of the step after a spike is lost. Whoever exchanges one kind for another gets other spikes.
# Output:
#     Leaky: spikes 1 0 1 0, membrane 1.50 0.90 1.35 0.90
#     Synaptic: spikes 1 0 0 1, membrane 1.50 0.00 0.90 1.35
#     RLeaky: spikes 1 0 0 1, membrane 1.50 0.00 0.90 1.35
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

KINDS = {
    "Leaky": snntorch.Leaky(beta=0.5, reset_mechanism="zero"),
    "Synaptic": snntorch.Synaptic(alpha=0.0, beta=0.5, reset_mechanism="zero"),
    "RLeaky": snntorch.RLeaky(beta=0.5, V=0.0, all_to_all=False, learn_recurrent=False, reset_mechanism="zero"),
}
KEPT, LOST = ([1, 0, 1, 0], ["1.50", "0.90", "1.35", "0.90"]), ([1, 0, 0, 1], ["1.50", "0.00", "0.90", "1.35"])

for name, neuron in KINDS.items():
    state = [torch.zeros(1) for _ in range(1 if name == "Leaky" else 2)]
    spikes, membranes = [], []
    for given in (1.5, 0.9, 0.9, 0.9):
        spike, *state = neuron(torch.tensor([given]), *state)
        if name == "RLeaky":  # its spikes are a state of their own
            state = [spike, *state]
        spikes.append(int(spike))
        membranes.append(f"{float(state[-1]):.2f}")
    print(f"{name}: spikes {' '.join(map(str, spikes))}, membrane {' '.join(membranes)}")
    assert (spikes, membranes) == (KEPT if name == "Leaky" else LOST), f"behaviour changed: {name}"
END
