#!/usr/bin/env bash
# In Lava's fixed-point LIF neuron du = 0 still leaks; dv = 0 does not.
#
# Version: lava-nc 0.10.0, fixed-point models.
# Expected: du and dv are the shares, of 4096, that current and voltage lose at each step. 0 means no leak for both.
# Seen: the current loses du + 1 parts of 4096, the voltage dv parts. A current cannot be kept, and the equation that holds
#     for one state is off by one for the other.
# Output:
#     du = 0: current 64000, 63984, 63968, 63952
#     dv = 0: voltage 64000, 64000, 64000, 64000
#     dv = 1: voltage 64000, 63984, 63968, 63952
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
from lava.proc.io.source import RingBuffer as Source
from lava.proc.lif.process import LIF
from lava.proc.monitor.process import Monitor

STEPS = 5


def trace(name, du, dv):
    """One message of 500 through a weight of 2, and a state of the neuron from then on."""
    x = np.zeros((1, STEPS), dtype=int)
    x[0, 0] = 500
    source, dense = Source(data=x), Dense(weights=np.array([[2]]), num_message_bits=16)
    lif, monitor = LIF(shape=(1,), du=du, dv=dv, vth=100_000), Monitor()
    source.s_out.connect(dense.s_in)
    dense.a_out.connect(lif.a_in)
    monitor.probe(getattr(lif, name), STEPS)
    try:
        lif.run(RunSteps(STEPS), Loihi2SimCfg(select_tag="fixed_pt"))
        (data,) = monitor.get_data().values()
        return data[name].flatten().astype(int).tolist()[1:]
    finally:
        lif.stop()


if __name__ == "__main__":
    leak = [64000, 63984, 63968, 63952]
    cases = [
        ("du = 0: current", "u", 0, 0, leak),
        ("dv = 0: voltage", "v", 4095, 0, [64000] * 4),
        ("dv = 1: voltage", "v", 4095, 1, leak),
    ]
    for text, state, du, dv, expected in cases:
        found = trace(state, du, dv)
        print(text, ", ".join(map(str, found)))
        assert found == expected, f"behaviour changed: {found}"
END
timeout 300 "$venv" finding.py
