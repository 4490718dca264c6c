"""The errors of this room."""

from __future__ import annotations


class NetxFileError(ValueError):
    """A `.net` file that cannot be read: cut short, no such file, or values that contradict each other."""


class NotInNetx(ValueError):
    """A layer, neuron or setting of a `.net` file that no population or projection does. Names it and the remedy."""
