# %% [markdown]
# # A sweep and its page
#
# A sweep runs several arms on several seeds at one budget, then compares them. This one is tiny: three arms, two seeds,
# a second of training each. It takes about half a minute on one core, most of it starting processes, and
# downloads nothing. Its point is the way through the tool, not its losses: so short a run can show nothing, and the
# verdict says so.

# %%
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(os.environ.get("SPIKEGATE_EXAMPLES", "runs/examples")).resolve()
SWEEP = FOLDER / "tiny_sweep"

# %% [markdown]
# ## The sweep file
#
# `settings` are given to every run, and each arm adds its own. They are the settings of `spikegate train`, which
# refuses a name that it does not know. The text is Python's own manual; thirty per cent of the stream is garbage.
# Every run gets the same budget: what plain training needs for 40,000 tokens. The arms' operations are priced by one table
# of times, which the first run measures and all others share.

# %%
FILE = FOLDER / "tiny_sweep.yaml"
FOLDER.mkdir(parents=True, exist_ok=True)
TEXT = f"""\
folder: {SWEEP}
settings:
  - experiment=noisy
  - data=pydoc
  - data.horizon_tokens=100000
  - model.width=32
  - model.layers=1
  - model.context=64
  - trainer.batch_windows=8
  - trainer.evaluations=3
  - trainer.eval_tokens=4096
  - trainer.compile=off
budget_tokens: 40000
seeds: [0, 1]
arms:
  dense: {{}}
  random: {{set: [gate=random, gate.keep_fraction=0.7]}}
  surprise: {{set: [gate=surprise, gate.keep_fraction=0.7]}}
"""
FILE.write_text(TEXT, encoding="utf-8")
print(TEXT)

# %% [markdown]
# ## The run
#
# This is `spikegate sweep FILE --jobs 1 --threads 1`. Stopped with Ctrl-C and started again, it goes on where it was;
# finished runs are not repeated.

# %%
shutil.rmtree(SWEEP, ignore_errors=True)
command = [sys.executable, "-m", "experiments.cli", "sweep", str(FILE), "--jobs", "1", "--threads", "1"]
done = subprocess.run(command, capture_output=True, text=True, check=False)
print(done.stderr)
print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("{")))  # the last line is for programs
if done.returncode:
    raise SystemExit(f"the sweep ended with exit code {done.returncode}")

# %% [markdown]
# ## The page
#
# `comparison.html` needs nothing but a browser: verdicts, tables that sort, pictures, and where each number comes from.
# `comparison.json` holds the same for programs.

# %%
page = SWEEP / "comparison" / "comparison.html"
document = json.loads((SWEEP / "comparison" / "comparison.json").read_text(encoding="utf-8"))
for name, stream in document["streams"].items():
    print(f"stream {name}: {', '.join(stream)}")
print(f"page: {page} ({page.stat().st_size / 1000:.0f} kB)")

# %%
browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
picture = FOLDER / "sweep_page.png"
if browser is None:
    print("no Chromium here, so no screenshot: open the page in a browser of yours")
else:
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}", "--window-size=1300,1500", f"--screenshot={picture}"]
        subprocess.run([browser, *flags, page.as_uri()], capture_output=True, check=True, timeout=60)
    print(f"screenshot: {picture}")
