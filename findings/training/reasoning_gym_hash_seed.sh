#!/usr/bin/env bash
# Some data sets of reasoning-gym give other questions in every process, in spite of their seed.
#
# Version: reasoning-gym 0.1.25.
# Expected: a data set with a seed is the same everywhere; the seed is documented as what makes it reproducible.
# Seen: ransom_note and isomorphic_strings draw from sets of characters, whose order follows Python's hash seed, another one
#     in every process. Question and answer of one index differ between two processes unless PYTHONHASHSEED is set.
# Output:
#     ransom_note: 10 of 10 questions differ between two processes
#     isomorphic_strings: 10 of 10 questions differ between two processes
#     chain_sum: 0 of 10 questions differ between two processes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check reasoning-gym==0.1.25
cd "$folder"
cat > ask.py <<'END'
import json
import sys

import reasoning_gym

print(json.dumps([entry["question"] for entry in reasoning_gym.create_dataset(sys.argv[1], seed=0, size=10)]))
END
for name in ransom_note isomorphic_strings chain_sum; do
  PYTHONHASHSEED=1 "$venv" ask.py "$name" > first.json
  PYTHONHASHSEED=2 "$venv" ask.py "$name" > second.json
  "$venv" - "$name" <<'END'
import json
import sys

one, two = (json.load(open(f"{name}.json")) for name in ("first", "second"))
differ = sum(a != b for a, b in zip(one, two))
print(f"{sys.argv[1]}: {differ} of 10 questions differ between two processes")
assert (differ > 0) == (sys.argv[1] != "chain_sum"), "behaviour changed"
END
done
