"""Which cores of a chip a network takes: which limit binds, and what its messages travel."""

from hardware.placement.demand import Connection, Convolution, LayerDemand
from hardware.placement.place import place
from hardware.placement.report import Core, DoesNotFit, LayerPlacement, Placement

__all__ = ["Connection", "Convolution", "Core", "DoesNotFit", "LayerDemand", "LayerPlacement", "Placement", "place"]
