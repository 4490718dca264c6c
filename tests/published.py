"""Files that others have published, which the project does not carry: a test skips where they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = "SPIKEGATE_PUBLISHED_DATA"
"""Environment variable that names the folder; without it, `shared/data` beside the checkout is tried."""


def published(name: str) -> Path:
    """The published file `name`, such as "nir_paper/cnn_sinabs.nir"; skips, naming the file, where it is absent.

    The files of the NIR paper come from the repository neuromorphs/NIR, commit 7232ada, folder paper/ (BSD-3-Clause).
    """
    folder = Path(os.environ.get(FOLDER, Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (path := folder / name).is_file():
        pytest.skip(f"the published file {name} is not here; {FOLDER} names the folder that holds it")
    return path
