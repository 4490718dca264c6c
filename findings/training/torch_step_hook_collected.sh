#!/usr/bin/env bash
# An optimizer's step fails when a hook of another object is taken out by garbage collection in the middle of it.
#
# Version: torch 2.13.0, CPU.
# Expected: an object that hears of every optimizer's step (register_optimizer_step_post_hook) may take its hook out when it
#     goes out of use, by weakref.finalize(owner, handle.remove); torch's module hooks are removed by such handles too.
# Seen: where the owner is collected while torch goes through the hooks of a step, that step ends with RuntimeError
#     "OrderedDict mutated during iteration", in whichever optimizer was at work, after the weights have moved. Objects in a
#     cycle are collected at any allocation, so it shows once in thousands of steps; here one hook asks for a collection. A
#     hook that only looks whether its owner is there, and is taken out later, does no harm.
# Output:
#     taken out when collected: RuntimeError: OrderedDict mutated during iteration, weight 0.0
#     taken out later: done, weight 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >finding.py <<'END'
import gc
import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Listener:
    def __init__(self, leave):
        self.itself = self  # in a cycle, as objects with callbacks are
        handle = register_optimizer_step_post_hook(lambda optimizer, args, options: None)
        weakref.finalize(self, leave, handle)


def step(leave):
    listeners = []

    def collect(optimizer, args, options):
        listeners.clear()
        gc.collect()

    first = register_optimizer_step_post_hook(collect)
    listeners.append(Listener(leave))
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.ones(1)
    try:
        torch.optim.SGD([weight], lr=1.0).step()
        said = "done"
    except RuntimeError as error:
        said = f"RuntimeError: {error}"
    finally:
        first.remove()
    return f"{said}, weight {weight.item()}"


left = []
at_once, later = step(lambda handle: handle.remove()), step(left.append)
for handle in left:
    handle.remove()
print(f"taken out when collected: {at_once}\ntaken out later: {later}")
assert at_once == "RuntimeError: OrderedDict mutated during iteration, weight 0.0", f"behaviour changed: {at_once}"
assert later == "done, weight 0.0", f"behaviour changed: {later}"
END
timeout 120 "$venv" finding.py
