#!/usr/bin/env bash
# snnTorch's RSynaptic ignores reset_delay=False, which its three sister neurons obey.
#
# Version: snntorch 1.0.0.
# Expected: with reset_delay=False a neuron that spikes is reset in the same step, as Leaky, RLeaky and Synaptic are.
# Seen: RSynaptic returns the same membrane potential for both values: it is above the threshold in the step of the spike and
#     reset one step later. A recurrent network that is trained for a chip which resets at once does not reset at once.
# Output:
#     Synaptic: membrane after a spike 1.5 with the delay, 0.0 without
#     RSynaptic: membrane after a spike 1.5 with the delay, 1.5 without
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 snntorch==1.0.0
cd "$folder"
"$venv" - <<'END'
import snntorch
import torch


def after_a_spike(kind, reset_delay):
    recurrent = kind is snntorch.RSynaptic
    given = {"linear_features": 1} if recurrent else {}
    neuron = kind(alpha=0.9, beta=0.8, threshold=1.0, reset_mechanism="zero", reset_delay=reset_delay, **given)
    with torch.no_grad():
        for parameter in neuron.recurrent.parameters() if recurrent else ():
            parameter.zero_()  # no recurrence: the reset alone is looked at
        states = [torch.zeros(1, 1) for _ in range(3 if recurrent else 2)]
        *_, membrane = answer = neuron(torch.tensor([[1.5]]), *states)
    assert float(answer[0]) == 1, "the neuron did not spike: the finding does not apply"
    return float(membrane)


for kind, expected in ((snntorch.Synaptic, (1.5, 0.0)), (snntorch.RSynaptic, (1.5, 1.5))):
    found = after_a_spike(kind, True), after_a_spike(kind, False)
    print(f"{kind.__name__}: membrane after a spike {found[0]} with the delay, {found[1]} without")
    assert found == expected, f"behaviour changed: {kind.__name__}"
END
