#!/usr/bin/env bash
# Lava's Conv takes weight_exp and num_weight_bits and ignores both, and its sums wrap at 24 bits where those of Dense do not.
#
# Version: lava-nc 0.10.0, fixed-point models, without torch in the environment.
# Expected: a convolution with a 1 x 1 kernel on one pixel is a Dense process with one weight: the same arguments give the
#     same sum.
# Seen: Dense multiplies its sum by 2^weight_exp, Conv does not. Dense clips a weight of 1000 to its 8 bits, Conv uses 1000.
#     A sum of 10,160,000 passes Dense and comes out of Conv as -6,617,216.
# Output:
#     weight 4, weight_exp 2, message 1: Dense 16, Conv 4
#     weight 1000, num_weight_bits 8, message 1: Dense 255, Conv 1000
#     weight 254, message 40000: Dense 10160000, Conv -6617216
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=
for found in "${PYTHON310:-}" python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python3; do
    if "$found" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; then
        python=$found
        break
    fi
done
if [[ -z $python ]]; then
    echo "skipped: lava-nc 0.10.0 needs Python 3.10; none was found on PATH, under pyenv or in PYTHON310"
    exit 77
fi
"$python" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps \
    lava-nc==0.10.0 asteval==0.9.33 cloudpickle==3.1.2 joblib==1.6.0 networkx==2.8.7 numpy==1.26.4 \
    scikit-learn==1.7.2 scipy==1.15.3 threadpoolctl==3.8.0
cd "$folder"
cat >finding.py <<'END'
import numpy as np
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.conv.process import Conv
from lava.proc.dense.process import Dense
from lava.proc.io.sink import RingBuffer as Sink
from lava.proc.io.source import RingBuffer as Source


def sums(process, x):
    """What leaves the synapses at each step, for messages x (sources, steps)."""
    source, sink = Source(data=x), Sink(shape=process.a_out.shape, buffer=x.shape[-1] + 1)
    source.s_out.connect(process.s_in)
    process.a_out.connect(sink.a_in)
    try:
        sink.run(RunSteps(x.shape[-1] + 1), Loihi2SimCfg(select_tag="fixed_pt"))
        return sink.data.get()[..., 1:].astype(int)  # synapses take one step
    finally:
        sink.stop()


if __name__ == "__main__":
    cases = [
        ("weight 4, weight_exp 2, message 1", 4, 1, {"weight_exp": 2}, (16, 4)),
        ("weight 1000, num_weight_bits 8, message 1", 1000, 1, {"num_weight_bits": 8}, (255, 1000)),
        ("weight 254, message 40000", 254, 40000, {}, (10160000, -6617216)),
    ]
    for name, weight, message, given, expected in cases:
        given = {"num_message_bits": 24, **given}
        dense = Dense(weights=np.array([[weight]]), **given)
        conv = Conv(weight=np.full((1, 1, 1, 1), weight), input_shape=(1, 1, 1), **given)
        found = int(sums(dense, np.array([[message]])).item()), int(sums(conv, np.full((1, 1, 1, 1), message)).item())
        print(f"{name}: Dense {found[0]}, Conv {found[1]}")
        assert found == expected, f"behaviour changed: {found}"
END
timeout 300 "$venv" finding.py
