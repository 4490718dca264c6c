"""Stand-in for the profilers: refuses what the real ones would not take, and measures made-up numbers.

They are filled in the process of the runtime service, and read in that of the caller: by way of a file.
"""

import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
from lava.magma.compiler.builders.runtimeservice_builder import RuntimeServiceBuilder
from lava.magma.core.callback_fx import NxSdkCallbackFx

FOLDER = Path(os.environ["SPIKEGATE_STANDIN_FOLDER"])

_build = RuntimeServiceBuilder.build


def build(self):
    """Lava gives a service on the CPU no callbacks; the stand-in's runs there."""
    service = _build(self)
    service.callbacks = self.rs_kwargs["callback_fxs"]
    return service


RuntimeServiceBuilder.build = build


class Profiler(NxSdkCallbackFx):
    values: ClassVar[dict] = {}

    def pre_run_callback(self, board=None, var_id_to_var_model_map=None):
        assert board.route["LOIHI_GEN"]
        self.board = board

    def post_run_callback(self, board=None, var_id_to_var_model_map=None):
        assert board is self.board, "before and after are different boards"
        (FOLDER / (type(self).__name__ + ".json")).write_text(json.dumps(self.values))

    def __getattr__(self, name):
        path = FOLDER / (type(self).__name__ + ".json")
        if name not in type(self).values:
            raise AttributeError(name)
        assert path.exists(), f"{name} was read before the run was stopped"
        value = json.loads(path.read_text())[name]
        return np.array(value) if isinstance(value, list) else value


class Loihi2Power(Profiler):
    values: ClassVar[dict] = {
        "total_power": [1.5, 1.25],
        "static_total_power": 1.0,
        "vdd_power": [0.5, 0.25],
        "vddm_power": [0.5, 0.5],
    }

    def __init__(self, num_steps):
        assert num_steps > 0


class Loihi2ExecutionTime(Profiler):
    values: ClassVar[dict] = {"avg_time_per_step": 5.5, "execution_time_per_step": [5.0, 6.0]}


class Loihi2Activity(Profiler):
    values: ClassVar[dict] = {
        "chip_idx": [0],
        "core_idx": [3],
        "syn_ops": [120],
        "dendrite_updates": [60],
        "spikes_in": [9],
        "axon_out": [4],
    }
