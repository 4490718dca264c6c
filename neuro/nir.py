"""`neuro.exchange.nir` by the name that it had up to 0.1.0: `from neuro.nir import from_nir`."""

from __future__ import annotations

from typing import Any

from neuro.exchange import nir


def __getattr__(name: str) -> Any:
    return getattr(nir, name)


def __dir__() -> list[str]:
    return nir.__all__
