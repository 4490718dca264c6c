#!/usr/bin/env bash
# torch's FLOP counter misses attention on the CPU, forward and backward.
#
# Version: torch 2.13.0, CPU.
# Expected: scaled_dot_product_attention counts its two products; they are counted on a GPU, and so are the same two products
#     written with matmul.
# Seen: on the CPU the operator behind scaled_dot_product_attention has no formula in torch.utils.flop_counter. Forward and
#     backward count 0 without a warning. FLOPs of a model are therefore lower on a CPU than on a GPU, and two
#     implementations of the same attention differ.
# Output:
#     matmul: forward 524288, forward and backward 1572864
#     scaled_dot_product_attention: forward 0, forward and backward 0
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
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("error")
q, k, v = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3))


def by_hand():
    return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v


def fused():
    return F.scaled_dot_product_attention(q, k, v)


def count(call, backward):
    with FlopCounterMode(display=False) as counter:
        out = call()
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


torch.testing.assert_close(by_hand(), fused())  # the same function
found = {}
for name, call in (("matmul", by_hand), ("scaled_dot_product_attention", fused)):
    found[name] = count(call, False), count(call, True)
    print(f"{name}: forward {found[name][0]}, forward and backward {found[name][1]}")
one = 2 * 2 * (2 * 4) * 32 * 32 * 16  # two products of 32 x 16 by 16 x 32, eight heads, two operations each
assert found["matmul"] == (one, 3 * one), "behaviour changed: the products written out count something else"
assert found["scaled_dot_product_attention"] == (0, 0), "behaviour changed: attention is counted on the CPU"
END
