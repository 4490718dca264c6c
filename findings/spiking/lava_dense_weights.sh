#!/usr/bin/env bash
# Lava changes the weights of Dense without a word, and how depends on the signs of the other weights.
#
# Version: lava-nc 0.10.0, fixed-point models.
# Expected: 8-bit weights hold -128 to 127, or 0 to 255; what does not fit is refused.
# Seen: a matrix with both signs has -256 to 254 in steps of two. Odd weights go down to the next even one (3 becomes 2, -3
#     becomes -4), 1000 becomes 254. In a matrix of one sign odd weights stay, and 1000 becomes 255. So one negative entry
#     changes all the odd ones beside it. Fractions are cut off before that: 1.9 becomes 0 and -1.9 becomes -2.
# Output:
#     mixed signs: 1, -1, 3, -3, 127, 1000 become 0, -2, 2, -4, 126, 254
#     one sign: 1, 3, 127, 1000 become 1, 3, 127, 255
#     fractions: 0.6, 1.9, -1.9 become 0, 0, -2
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
    cases = {
        "mixed signs": ([1, -1, 3, -3, 127, 1000], [0, -2, 2, -4, 126, 254]),
        "one sign": ([1, 3, 127, 1000], [1, 3, 127, 255]),
        "fractions": ([0.6, 1.9, -1.9], [0, 0, -2]),
    }
    for name, (weights, expected) in cases.items():
        process = Dense(weights=np.array(weights)[:, None], num_message_bits=8)
        found = sums(process, np.array([[1]]))[:, 0].tolist()  # one message of 1 shows the weights as they are
        print(f"{name}: {', '.join(map(str, weights))} become {', '.join(map(str, found))}")
        assert found == expected, f"behaviour changed: {found}"
END
timeout 300 "$venv" finding.py
