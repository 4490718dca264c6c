"""Stand-in for the runtime service of a board: calls the callbacks of Loihi2HwCfg around a run, with a board."""

import json
import os
from pathlib import Path

from lava.magma.runtime.runtime_services.runtime_service import LoihiPyRuntimeService

FOLDER = Path(os.environ["SPIKEGATE_STANDIN_FOLDER"])
_run = LoihiPyRuntimeService.run


class Board:
    """What the callbacks get; knows by which way it was reached, as the real driver would have to."""

    def __init__(self):
        keys = ("LOIHI_GEN", "SLURM", "NOSLURM", "BOARD", "PARTITION", "NXSDKHOST", "HOST_BINARY")
        self.route = {key: os.environ.get(key) for key in keys}
        by_slurm = self.route["SLURM"] == "1" and (self.route["BOARD"] or self.route["PARTITION"])
        by_ethernet = self.route["NOSLURM"] == "1" and self.route["NXSDKHOST"] and self.route["HOST_BINARY"]
        assert self.route["LOIHI_GEN"], "LOIHI_GEN is not set"
        assert bool(by_slurm) != bool(by_ethernet), f"exactly one route is needed: {self.route}"


def run(self):
    board = Board()
    (FOLDER / "route.json").write_text(json.dumps(board.route))
    for callback in getattr(self, "callbacks", ()):
        callback.pre_run_callback(board, {})
    try:
        _run(self)
    finally:
        for callback in getattr(self, "callbacks", ()):
            callback.post_run_callback(board, {})


LoihiPyRuntimeService.run = run


class NxSdkRuntimeService(LoihiPyRuntimeService):
    """Lava asks for it by this name."""
