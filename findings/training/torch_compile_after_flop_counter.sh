#!/usr/bin/env bash
# A FLOP counter around the first call of a compiled module leaves that module uncompiled for good.
#
# Version: torch 2.13.0, CPU.
# Expected: a module that is called once under torch.utils.flop_counter.FlopCounterMode runs eagerly there, so that it can be
#     counted, and is compiled at the next call without the counter.
# Seen: it is never compiled. torch.compile looks at a piece of code when it is first called, finds a dispatch mode active,
#     and puts the code on its list of what it skips. No warning says so, and results are right. Who counts the FLOPs of
#     the first step and times the later ones has timed eager code. A call without the counter before it helps.
# Output:
#     first call plain: compiled graphs after each call 1, 1, 1
#     first call counted: compiled graphs after each call 0, 0, 0
#     first call plain, second counted: compiled graphs after each call 1, 1, 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >finding.py <<'END'
import contextlib
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

graphs = 0


def backend(module, inputs):
    global graphs
    graphs += 1
    return module.forward


counted = [word == "counted" for word in sys.argv[1:]]
model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend=backend)
after = []
for under_the_counter in counted:
    with FlopCounterMode(display=False) if under_the_counter else contextlib.nullcontext() as counter:
        model(torch.ones(2, 8))
    if under_the_counter:
        assert counter.get_total_flops() == 2 * 2 * 8 * 8, "behaviour changed: the counter does not see the product"
    after.append(graphs)
expected = [0, 0, 0] if counted[0] else [1, 1, 1]
print(", ".join(map(str, after)))
assert after == expected, f"behaviour changed: {after}"
END
# Each in a process of its own: what is skipped once is skipped by all of the process.
printf 'first call plain: compiled graphs after each call '
timeout 120 "$venv" finding.py plain plain plain
printf 'first call counted: compiled graphs after each call '
timeout 120 "$venv" finding.py counted plain plain
printf 'first call plain, second counted: compiled graphs after each call '
timeout 120 "$venv" finding.py plain counted plain
