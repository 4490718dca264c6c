#!/usr/bin/env bash
# When a worker of joblib's pool dies, programs that healthy workers started are killed at once; the dead worker's goes on.
#
# Version: joblib 1.6.0 (its process pool is the loky that comes within it).
# Expected: a worker that dies (killed for memory, say) breaks the pool, and the other workers are ended. What their tasks
#     had started, a training run in a session of its own for instance, is left alone as the dead worker's is, or is asked
#     to end, so that it can save.
# Seen: loky ends the other workers with all their descendants by SIGKILL, sessions of their own included: nothing is told,
#     no handler runs. The program of the worker that died is the one that goes on, with nobody waiting for it.
# Output:
#     worker 0, killed: its program goes on
#     worker 1, healthy: its program was killed, and not told before
set -euo pipefail
command -v pgrep > /dev/null || { echo "skipped: no pgrep, which loky asks for the children of a process"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps cloudpickle==3.1.2 joblib==1.6.0
cd "$folder"
cat > program.py <<'END'
import os, signal, sys, time

name = sys.argv[1]


def told(number, frame):
    open(f"told{name}", "w").close()
    sys.exit(0)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, told)
with open(f"part{name}", "w") as file:
    file.write(str(os.getpid()))
os.replace(f"part{name}", f"program{name}")
time.sleep(60)
END
cat > pool.py <<'END'
import os
import signal
import subprocess
import sys
import time

from joblib.externals.loky import get_reusable_executor


def task(number):
    with open(f"worker{number}", "w") as file:
        file.write(str(os.getpid()))
    return subprocess.Popen([sys.executable, "program.py", str(number)], start_new_session=True).wait()


def state(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "gone"


if __name__ == "__main__":
    pool = get_reusable_executor(max_workers=2)
    futures = [pool.submit(task, number) for number in range(2)]
    while not all(os.path.exists(f"program{number}") for number in range(2)):
        time.sleep(0.05)
    programs = [int(open(f"program{number}").read()) for number in range(2)]
    os.kill(int(open("worker0").read()), signal.SIGKILL)
    failed = [type(future.exception()).__name__ for future in futures]
    assert failed == ["TerminatedWorkerError"] * 2, failed
    time.sleep(2)
    alive = [state(process) not in ("Z", "gone") for process in programs]
    told = [os.path.exists(f"told{number}") for number in range(2)]
    for process in programs:
        if state(process) not in ("Z", "gone"):
            os.kill(process, signal.SIGKILL)
    print(f"worker 0, killed: its program {'goes on' if alive[0] else 'ended'}")
    print(f"worker 1, healthy: its program {'goes on' if alive[1] else 'was killed'}, and {'' if told[1] else 'not '}told before")
    assert alive == [True, False] and told == [False, False], "behaviour changed"
END
"$venv" pool.py
