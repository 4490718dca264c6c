"""What a GPU machine without a package index needs besides torch, as wheels in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NEEDED = (
    "hydra-core", "omegaconf", "antlr4-python3-runtime", "tensorboard", "tensorboard-data-server", "protobuf", "grpcio",
    "markdown", "werkzeug", "absl-py", "safetensors", "PyYAML", "rich", "markdown-it-py", "mdurl", "pygments",
    "argcomplete", "scipy", "nvidia-ml-py",
)  # fmt: skip
"""The core's dependencies and theirs, without torch, numpy and matplotlib's, which every image with torch has."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class WheelError(RuntimeError):
    """pip could not pack a wheel."""


def pack(folder: Path, python: str, names: tuple[str, ...] = NEEDED) -> list[Path]:
    """Download the wheels for a version of Python on Linux x86-64, such as "3.12"; builds the ones that are published as
    source only.

    Raises:
        WheelError: pip's last line, with the name of the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--python-version", python, "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    for name in names:
        ready = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder), name]
        done = subprocess.run(ready, capture_output=True, text=True)
        if done.returncode:  # no wheel is published: pure Python, built here
            built = [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), name]
            done = subprocess.run(built, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise WheelError(f"no wheel of {name} for Python {python}: {said}")
    return sorted(folder.glob("*.whl"))
