#!/usr/bin/env bash
# torch's FLOP counter sees no work at all in a Transformer layer that is in evaluation mode.
#
# Version: torch 2.13.0, CPU.
# Expected: the forward pass of one layer counts the same operations in training and in evaluation mode; without dropout both
#     compute the same.
# Seen: in evaluation mode and without gradients, nn.TransformerEncoderLayer and nn.MultiheadAttention take a fused operator
#     that torch.utils.flop_counter has no formula for. The count is 0, and no warning says so. With gradients enabled the same
#     layer in evaluation mode is counted. An "inference cost" taken this way is free.
# Output:
#     TransformerEncoderLayer: training 6291456, evaluation with gradients 6291456, evaluation 0
#     MultiheadAttention: training 2097152, evaluation with gradients 2097152, evaluation 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv" - <<'END'
import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("error")
x = torch.randn(2, 32, 64)


def count(call, gradients):
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
attention = nn.MultiheadAttention(64, 4, batch_first=True)
calls = {
    "TransformerEncoderLayer": (layer, lambda: layer(x)),
    "MultiheadAttention": (attention, lambda: attention(x, x, x, need_weights=False)),
}
for name, (module, call) in calls.items():
    training = count(call, False)
    module.eval()
    with_gradients, evaluation = count(call, True), count(call, False)
    print(f"{name}: training {training}, evaluation with gradients {with_gradients}, evaluation {evaluation}")
    assert training > 0 and with_gradients == training and evaluation == 0, f"behaviour changed: {name}"
END
