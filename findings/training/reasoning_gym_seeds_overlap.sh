#!/usr/bin/env bash
# A data set of reasoning-gym made with another seed holds nearly the same questions, so it is no held-out set.
#
# Version: reasoning-gym 0.1.25.
# Expected: two data sets of one kind with different seeds share no more questions than chance makes them.
# Seen: instance i of a data set is drawn from Random(seed + i). A data set with the next seed is the same one, moved by an
#     instance: 499 of 500 questions are those of the first. Seeds must lie further apart than the sizes.
# Output:
#     chain_sum, seeds 0 and 1: 499 of 500 questions are the same, in the same order but moved by one
#     chain_sum, seeds 0 and 1000000: 0 of 500 questions are the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check reasoning-gym==0.1.25
cd "$folder"
"$venv" - <<'END'
import reasoning_gym


def questions(seed):
    data = reasoning_gym.create_dataset("chain_sum", seed=seed, size=500, min_digits=6, max_digits=8, min_terms=4, max_terms=6)
    return [entry["question"] for entry in data]


first, next_, far = questions(0), questions(1), questions(1000000)
same, apart = len(set(first) & set(next_)), len(set(first) & set(far))
moved = "in the same order but moved by one" if next_[:-1] == first[1:] else "in another order"
print(f"chain_sum, seeds 0 and 1: {same} of 500 questions are the same, {moved}")
print(f"chain_sum, seeds 0 and 1000000: {apart} of 500 questions are the same")
assert same == 499 and next_[:-1] == first[1:] and apart == 0, "behaviour changed"
END
