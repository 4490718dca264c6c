#!/usr/bin/env bash
# Lava's Dense reads every message that is not 0 as +1 where its messages have 0 bits: a ternary -1 becomes +1.
#
# Version: lava-nc 0.10.0, fixed-point models.
# Expected: TernaryLIF sends -1, 0 and 1. A Dense process behind it, with the default num_message_bits=0, passes -1 on as -1,
#     or refuses it.
# Seen: 0 bits mean "binary", and binary means "not 0": the sign is lost without a word, and so is the size of a graded
#     message. With num_message_bits=1 the sign arrives.
# Output:
#     num_message_bits 0: messages 1, -1, 5 through a weight of 2 give 2, 2, 2
#     num_message_bits 1: messages 1, -1, 5 through a weight of 2 give 2, -2, 10
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
    x = np.array([[1, -1, 5]])
    for bits, expected in ((0, [2, 2, 2]), (1, [2, -2, 10])):
        found = sums(Dense(weights=np.array([[2]]), num_message_bits=bits), x)[0].tolist()
        print(f"num_message_bits {bits}: messages 1, -1, 5 through a weight of 2 give", ", ".join(map(str, found)))
        assert found == expected, f"behaviour changed: {found}"
END
timeout 300 "$venv" finding.py
