"""Integer graphs and their file: populations, projections, the checks that make a graph lawful, reading and writing.

`demand.py` (what a graph asks of a chip's cores) is not imported here: it needs `hardware`, and the Lava worker loads this
package under Python 3.10 with numpy alone.
"""

from neuro.graph.archive import HEADER_KEY, ArchiveError, read_archive, read_with_header, write_archive
from neuro.graph.files import FILE_SUFFIX, GraphFileError, load_graph, save_graph
from neuro.graph.kinds import MESSAGE_BITS_RANGE, WEIGHT_EXP_RANGE, WEIGHT_RANGE, GraphError
from neuro.graph.network import PORTS, Population, SpikingGraph, identical
from neuro.graph.synapses import Convolution, Projection, truncate_weights, weight_step

__all__ = [
    "FILE_SUFFIX",
    "HEADER_KEY",
    "MESSAGE_BITS_RANGE",
    "PORTS",
    "WEIGHT_EXP_RANGE",
    "WEIGHT_RANGE",
    "ArchiveError",
    "Convolution",
    "GraphError",
    "GraphFileError",
    "Population",
    "Projection",
    "SpikingGraph",
    "identical",
    "load_graph",
    "read_archive",
    "read_with_header",
    "save_graph",
    "truncate_weights",
    "weight_step",
    "write_archive",
]
