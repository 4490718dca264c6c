#!/usr/bin/env bash
# snnTorch's soft reset without delay takes the threshold off a second time, before the next comparison.
#
# Version: snntorch 1.0.0.
# Expected: reset_mechanism="subtract" with reset_delay=False subtracts the threshold once, in the step of the spike. A neuron
#     without leak that one input carries to three thresholds then spikes three times: at 3, at 2, and not at 1.
# Seen: it spikes once. The next step subtracts the threshold again before it compares, and does not keep that result: the
#     membrane it returns stays at 2, twice the threshold, and the neuron stays silent. With the delay it spikes twice.
# Output:
#     delayed: spikes 1 1 0 0, membrane 3.0 2.0 1.0 1.0
#     at once: spikes 1 0 0 0, membrane 2.0 2.0 2.0 2.0
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


def after_one_input(reset_delay):
    """Spikes and membrane of a neuron that gets 3 thresholds at once and nothing more."""
    neuron = snntorch.Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract", reset_delay=reset_delay)
    membrane, spikes, membranes = torch.zeros(1), [], []
    for given in (3.0, 0.0, 0.0, 0.0):
        spike, membrane = neuron(torch.tensor([given]), membrane)
        spikes.append(int(spike))
        membranes.append(float(membrane))
    return spikes, membranes


for word, delay, expected in (
    ("delayed", True, ([1, 1, 0, 0], [3.0, 2.0, 1.0, 1.0])),
    ("at once", False, ([1, 0, 0, 0], [2.0, 2.0, 2.0, 2.0])),
):
    spikes, membranes = found = after_one_input(delay)
    print(f"{word}: spikes {' '.join(map(str, spikes))}, membrane {' '.join(map(str, membranes))}")
    assert found == expected, f"behaviour changed: {word}"
END
