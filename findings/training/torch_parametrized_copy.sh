#!/usr/bin/env bash
# Taking weight norm off a deep copy of a layer breaks the layer that was copied.
#
# Version: torch 2.13.0.
# Expected: copy.deepcopy gives a layer that is independent of the first. An averaged or exported copy may have its
#     parametrisations removed, as one does for inference, while the original trains on.
# Seen: the copy shares the class that register_parametrization made for the original, and remove_parametrizations deletes
#     the property `weight` of that class. The next forward of the original raises AttributeError. Removing it from the
#     original instead breaks the copy. Any parametrisation does so: weight norm, spectral norm, orthogonal.
# Output:
#     weight_norm: copy as before, original AttributeError
#     spectral_norm: copy as before, original AttributeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv" - <<'END'
import copy
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

warnings.simplefilter("error")
x = torch.ones(1, 3)
for name in ("weight_norm", "spectral_norm"):
    torch.manual_seed(0)
    layer = getattr(parametrizations, name)(nn.Linear(3, 3)).eval()
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    parametrize.remove_parametrizations(twin, "weight")
    torch.testing.assert_close(twin(x), before)
    try:
        layer(x)
        original = "runs"
    except AttributeError:
        original = "AttributeError"
    print(f"{name}: copy as before, original {original}")
    assert original == "AttributeError", f"behaviour changed: {name}: the original still runs"
END
