"""Stand-in for StateProbe: the series of a variable of a model on a neuro core, one neuron after the other."""

import os
from pathlib import Path

import numpy as np
from lava.magma.core.callback_fx import NxSdkCallbackFx
from lava.magma.core.process.variable import Var

FOLDER = Path(os.environ["SPIKEGATE_STANDIN_FOLDER"])


class StateProbe(NxSdkCallbackFx):
    def __init__(self, var):
        assert isinstance(var, Var), "StateProbe takes a Var"
        self.path, self.size = FOLDER / f"{var.process.id}.{var.name}.bin", var.shape[0]

    def pre_run_callback(self, board=None, var_id_to_var_model_map=None):
        self.path.write_bytes(b"")

    def post_run_callback(self, board=None, var_id_to_var_model_map=None):
        assert self.path.exists()

    @property
    def time_series(self):
        return np.fromfile(self.path, dtype=np.int32).reshape(-1, self.size).T.ravel()
