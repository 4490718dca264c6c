#!/usr/bin/env bash
# A tensor that safetensors has read has the bits that were saved, and its scalar product has other ones.
#
# Version: safetensors 0.8.0, torch 2.13.0 (CPU build with MKL), on an x86 core with AVX2.
# Expected: load_file gives back what save_file was given, so that torch.dot of the loaded tensors, a deterministic function
#     of their bits, is what it was before: a resumed training goes on to the same bits.
# Seen: loaded tensors are parts of one mapping of the file and start where the file has them, at a multiple of 8 bytes, where torch's own start at a
#     multiple of 64. MKL sums in another order there, so some scalar products and matrix-vector products differ in their
#     last bits. A clone of the loaded tensor gives what it was. So a state that an optimizer or mask multiplies has to be
#     cloned after load_file, or the run drifts from the uninterrupted one.
# Output:
#     8 files of 32 pairs: all equal to the bit, 84 scalar products differ, 0 of their clones
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -qw avx2 /proc/cpuinfo || exit 77
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
cat >finding.py <<'END'
import torch
from safetensors.torch import load_file, save_file

if not torch.backends.mkl.is_available():
    raise SystemExit(77)
torch.set_num_threads(1)
torch.manual_seed(0)
saved = {f"{side}{i}": torch.randn(1000) for i in range(32) for side in "ab"}
dots = [torch.dot(saved[f"a{i}"], saved[f"b{i}"]) for i in range(32)]
other = cloned = 0
for length in range(0, 64, 8):  # the header's length says where in a line of 64 bytes the tensors begin
    save_file(saved, "state.safetensors", metadata={"note": "x" * length})
    loaded = load_file("state.safetensors")
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    pairs = [(loaded[f"a{i}"], loaded[f"b{i}"]) for i in range(32)]
    other += sum(not torch.equal(torch.dot(a, b), dot) for (a, b), dot in zip(pairs, dots))
    cloned += sum(not torch.equal(torch.dot(a.clone(), b.clone()), dot) for (a, b), dot in zip(pairs, dots))
print(f"8 files of 32 pairs: all equal to the bit, {other} scalar products differ, {cloned} of their clones")
assert other > 0 and cloned == 0, "behaviour changed"
END
OMP_NUM_THREADS=1 timeout 120 "$venv" finding.py
