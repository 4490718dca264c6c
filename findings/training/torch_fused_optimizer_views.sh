#!/usr/bin/env bash
# torch's fused optimizers on the CPU write past a parameter that is a view of columns.
#
# Version: torch 2.13.0, CPU.
# Expected: a parameter made of two columns of a matrix is updated in these two columns, with or without `fused=True`.
# Seen: the fused kernel walks over the memory from the view's first element and ignores the strides. It moves six values that
#     lie next to each other: four of them are not in the parameter, and four that are in it stay as they were. Nothing is
#     raised. Adam, AdamW, SGD and Adagrad do it alike. Whoever trains a slice of a frozen matrix changes the frozen part.
# Output:
#     AdamW fused=False [[-0.1, -0.1, 0.0, 0.0], [-0.1, -0.1, 0.0, 0.0], [-0.1, -0.1, 0.0, 0.0]]
#     AdamW fused=True [[-0.1, -0.1, -0.1, -0.1], [-0.1, -0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv" - <<'END'
import torch
from torch import nn


def moved(kind, fused):
    matrix = torch.zeros(3, 4)  # frozen, but for its first two columns
    columns = nn.Parameter(matrix[:, :2])
    assert columns.data_ptr() == matrix.data_ptr(), "the parameter is no view any more: the finding does not apply"
    columns.grad = torch.ones(3, 2)
    kind([columns], lr=0.1, fused=fused).step()
    return [[round(value, 3) for value in row] for row in matrix.tolist()]


right = [[-0.1, -0.1, 0.0, 0.0]] * 3
wrong = [[-0.1, -0.1, -0.1, -0.1], [-0.1, -0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
    for fused, expected in ((False, right), (True, wrong)):
        found = moved(kind, fused)
        print(kind.__name__, f"fused={fused}", found)
        assert found == expected, f"behaviour changed: {kind.__name__}, fused={fused} moved {found}"
END
