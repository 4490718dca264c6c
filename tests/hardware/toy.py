"""A two-layer network small enough to work out by hand: one neuron a core, a on tile 0, b on tile 1 south of it."""

from __future__ import annotations

from hardware import Connection, Counts, LayerDemand, Placement, place

A = Counts("a", 10, 40, 10, 12, 28, 80, 8, False, 1)
B = Counts("b", 10, 20, 5, 8, 32, 160, 16, False, 1)
HEAD = Counts("head", 10, 0, 0, 0, 0, 600, 60, False, 0, host=True)


def toy() -> Placement:
    """2 inputs on the host -> a, 4 neurons on cores 0 to 3 -> b, 4 neurons on cores 4 to 7; Loihi 1."""
    return place(
        [
            LayerDemand("in", 2, on_chip=False),
            LayerDemand("a", 4, (Connection("in", 2),), cores=4),
            LayerDemand("b", 4, (Connection("a", 4),), cores=4),
        ],
        "loihi1",
    )
