#!/usr/bin/env bash
# Zeus leaves the CPU and the memory out of total_energy, and says 0 J where it measured only them.
#
# Version: zeus 0.16.0.
# Expected: total_energy of a measurement is the sum of what was measured, and "nothing was measured" is not a number.
# Seen: total_energy adds up the GPUs only. A measurement with 5 J of the CPU and 2 J of its memory has a total of 0. On a
#     machine with neither GPU nor readable RAPL the monitor starts as usual, and its window has a total of 0 J as well:
#     training was free.
# Output (the last line only without a GPU):
#     CPU 5 J, memory 2 J: total_energy 0
#     GPU 3 J, CPU 5 J, memory 2 J: total_energy 3.0
#     a window on this machine: GPUs {}, total_energy 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps zeus==0.16.0 cloudpickle==3.1.2 \
    httpx==0.28.1 idna==3.20 joblib==1.6.0 narwhals==2.29.0 numpy==2.4.6 nvidia-ml-py==13.615.71 scikit-learn==1.9.1 \
    scipy==1.17.1 threadpoolctl==3.8.0
cd "$folder"
"$venv" - <<'END'
import logging

from zeus.monitor import ZeusMonitor
from zeus.monitor.energy import Measurement

logging.disable(logging.CRITICAL)
for gpu in ({}, {0: 3.0}):
    measured = Measurement(time=1.0, gpu_energy=gpu, cpu_energy={0: 5.0}, dram_energy={0: 2.0})
    text = "GPU 3 J, " if gpu else ""
    print(f"{text}CPU 5 J, memory 2 J: total_energy {measured.total_energy}")
    assert measured.total_energy == sum(gpu.values()), "behaviour changed: total_energy counts more than the GPUs"

monitor = ZeusMonitor()
monitor.begin_window("work")
sum(range(10**6))
window = monitor.end_window("work")
if window.gpu_energy:
    print("this machine has a GPU: the window without one is not tried")
else:
    print(f"a window on this machine: GPUs {window.gpu_energy}, total_energy {window.total_energy}")
    assert window.total_energy == 0, "behaviour changed: a window without a GPU has another total"
END
