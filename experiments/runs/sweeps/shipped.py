"""Sweep files that come along with the package, by name."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

SUFFIXES = (".yaml", ".yml")


def shipped() -> list[str]:
    """Names of the shipped sweeps, sorted."""
    return sorted(_files())


def shipped_file(name: str) -> Traversable:
    """The file of the shipped sweep `name`, whether or not it is there."""
    return _files().get(name) or files("configs").joinpath("sweep", f"{name}.yaml")


def _files() -> dict[str, Traversable]:
    """Name -> file, of the sweeps' folder and the folders in it."""
    folder = files("configs").joinpath("sweep")
    entries = [entry for at in (folder, *(at for at in folder.iterdir() if at.is_dir())) for entry in at.iterdir()]
    return {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}
