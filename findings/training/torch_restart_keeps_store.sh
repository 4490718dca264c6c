#!/usr/bin/env bash
# Ranks that torchrun starts again find the store of the start before, with its keys in it.
#
# Version: torch 2.13.0.
# Expected: after a failure, torchrun --max-restarts gives the new ranks a store of their own; torch's own code for the ranks
#     says that each start has a new one and therefore adds no prefix.
# Seen: with the default rendezvous on one machine the agent goes on with one TCPStore. Address, port and keys are those of
#     the first start. gloo keeps each rank's address under a key of its name, so a rank that comes up before another may
#     read the address of a process that is gone, and init_process_group fails with "Connection refused". A PrefixStore by
#     TORCHELASTIC_RESTART_COUNT, given to init_process_group, keeps the starts apart.
# Output:
#     start 0: the key is new
#     start 1: the key is there, the port is the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > rank.py <<'END'
import datetime
import os
import sys

import torch.distributed as dist

start, port = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["MASTER_PORT"]
assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(port), 1, is_master=False, timeout=datetime.timedelta(seconds=30))
if start == "0":
    assert not store.check(["of this start"])
    store.set("of this start", port)
    print("start 0: the key is new", flush=True)
    sys.exit(1)  # a failure, after which torchrun starts the rank again
assert store.check(["of this start"]), "behaviour changed: a start has a store of its own"
assert store.get("of this start").decode() == port
print("start 1: the key is there, the port is the same", flush=True)
END
OMP_NUM_THREADS=1 "$venv" -m torch.distributed.run --nproc-per-node 1 --max-restarts 1 rank.py 2> errors.txt || { cat errors.txt; exit 1; }
