"""Stand-in for the LIF model of a neuro core: Lava's own, which also tells a probe what its state is."""

import os
from pathlib import Path

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.nc.model import AbstractNcProcessModel
from lava.magma.core.resources import Loihi2NeuroCore
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
from lava.proc.lif.models import PyLifModelBitAcc
from lava.proc.lif.process import LIF

FOLDER = Path(os.environ["SPIKEGATE_STANDIN_FOLDER"])
FAULT = os.environ.get("SPIKEGATE_STANDIN_FAULT", "")


@implements(proc=LIF, protocol=LoihiProtocol)
@requires(Loihi2NeuroCore)
@tag("fixed_pt")
class NcLif(PyLifModelBitAcc, AbstractNcProcessModel):
    def run_spk(self):
        super().run_spk()
        if FAULT == "drift" and self.time_step == 5:
            self.v[0] += 1
        for name in ("u", "v"):
            path = FOLDER / f"{self.model_id}.{name}.bin"
            if path.exists():
                with path.open("ab") as file:
                    file.write(np.array(getattr(self, name), dtype=np.int32).tobytes())
