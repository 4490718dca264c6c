"""Sweep files that come along with the package, by name."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

SUFFIXES = (".yaml", ".yml")


def shipped() -> list[str]:
    """Names of the shipped sweeps, sorted."""
    folder = files("configs").joinpath("sweep")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def shipped_file(name: str) -> Traversable:
    """The file of the shipped sweep `name`, whether or not it is there."""
    return files("configs").joinpath("sweep", f"{name}.yaml")
