#!/usr/bin/env bash
# The scorer of reasoning-gym's spell_backward gives wrong answers the full score, or more than 1, depending on their length.
#
# Version: reasoning-gym 0.1.25.
# Expected: a word with something behind it is wrong; the code means to give it 0.8, and every score is from 0 to 1.
# Seen: the scorer adds 1 / length for each right letter and takes 0.2 off where the sum == 1.0. Ten times 0.1 is
#     0.9999999999999999, so for a word of ten letters nothing is taken off; of other lengths the sum is above 1.
# Output:
#     a word of 4 letters with "xyz" behind it: 0.8
#     a word of 10 letters with "xyz" behind it: 0.9999999999999999
#     lengths 3 to 30: 7 give 0.8, 21 the full score, of them 6 more than 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
venv=$folder/venv/bin/python
"$venv" -m pip install --quiet --no-compile --disable-pip-version-check reasoning-gym==0.1.25
cd "$folder"
"$venv" - <<'END'
import reasoning_gym

data = reasoning_gym.create_dataset("spell_backward", seed=0)


def score(length):
    word = "abcdefghijklmnopqrstuvwxyzabcd"[:length]
    return data.score_answer(word + "xyz", {"answer": word})


for length in (4, 10):
    print(f'a word of {length} letters with "xyz" behind it: {score(length)}')
found = [score(length) for length in range(3, 31)]
full = [value for value in found if value > 0.99]
less = sum(abs(value - 0.8) < 1e-9 for value in found)
print(f"lengths 3 to 30: {less} give 0.8, {len(full)} the full score, of them {sum(v > 1 for v in full)} more than 1")
assert score(4) == 0.8 and score(10) > 0.99 and max(found) > 1, "behaviour changed"
END
