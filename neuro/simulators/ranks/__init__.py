"""The integer simulator over several processes, bit for bit as one: samples shared out, or the populations of one graph."""

from neuro.simulators.ranks.pool import RankError, Ranks
from neuro.simulators.ranks.splitting import SplitError, partition

__all__ = ["RankError", "Ranks", "SplitError", "partition"]
