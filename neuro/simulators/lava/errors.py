"""What can go wrong between us and Lava, one type each; all are `LavaError`, and none of them leaves a process behind."""

from __future__ import annotations


class LavaError(RuntimeError):
    """Lava failed; the message holds what it wrote to stderr."""


class LavaUnavailable(LavaError):
    """No interpreter with lava-nc: says where one was looked for and how to get one."""


class LavaTimeout(LavaError):
    """The worker was still running at the time limit and was ended."""


class LavaUnsupported(LavaError):
    """The graph holds something that Lava 0.10 has no fixed-point model of, or the board none; it is named."""


class LavaRoute(LavaError):
    """The host of a board could not be reached by Lava itself, although all that can be probed was there."""


class LavaMemory(LavaError):
    """Shared memory (/dev/shm) is too small for the network; nothing was half-run."""


class LavaCrash(LavaError):
    """The worker, or a process of its network, raised or vanished in the middle of a run."""
