"""A Lava process that keeps what arrives at its ports, and variables of others, and writes arrays at its last step.

Reading a Lava Var from outside costs about 20 microseconds per element; this writes whole arrays from within.
"""

from __future__ import annotations

import os
import time

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyRefPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, RefPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class RecorderBase(AbstractProcess):
    """Ports as given; a subclass is made for each number of ports, because Lava's models declare ports by name."""

    def __init__(self, messages: list, variables: list, steps: int, path: str, fault: str) -> None:
        """`messages`: (key, size) of each port; `variables`: (key, Var) to be read after each step."""
        keys = [key for key, _ in messages] + [key for key, _ in variables]
        super().__init__(keys=keys, ports=len(messages), steps=steps, path=path, fault=fault)
        for index, (_, size) in enumerate(messages):
            setattr(self, "port%d" % index, InPort(shape=(size,)))
        for index, (_, variable) in enumerate(variables):
            reference = RefPort(variable.shape)
            setattr(self, "reference%d" % index, reference)
        self._post_init()
        for index, (_, variable) in enumerate(variables):
            getattr(self, "reference%d" % index).connect_var(variable)


class RecorderModelBase(PyLoihiProcessModel):
    """Keeps rows in lists; the last step writes them as int32 (steps, size) under their keys."""

    def __init__(self, proc_params) -> None:
        super().__init__(proc_params)
        self.keys = proc_params["keys"]
        self.ports_in = proc_params["ports"]
        self.steps = proc_params["steps"]
        self.path = proc_params["path"]
        self.fault, _, step = proc_params["fault"].partition(":")
        self.fault_step = int(step or 1)
        self.rows = [[] for _ in self.keys]

    def run_spk(self) -> None:
        if self.time_step == self.fault_step:
            self.fail_on_purpose()
        for index in range(self.ports_in):
            self.rows[index].append(getattr(self, "port%d" % index).recv().astype(np.int32))

    def fail_on_purpose(self) -> None:
        if self.fault == "raise":
            raise ArithmeticError("raised on purpose inside a Lava process model")
        if self.fault == "exit":
            os._exit(3)
        if self.fault == "hang":
            time.sleep(3600)

    def post_guard(self) -> bool:
        return True

    def run_post_mgmt(self) -> None:
        for index in range(self.ports_in, len(self.keys)):
            reference = getattr(self, "reference%d" % (index - self.ports_in))
            self.rows[index].append(np.array(reference.read(), dtype=np.int32))
        if self.time_step == self.steps:
            arrays = {key: np.stack(rows) for key, rows in zip(self.keys, self.rows, strict=True)}
            np.savez(self.path + ".part.npz", **arrays)
            os.replace(self.path + ".part.npz", self.path)


def make_recorder(messages: list, variables: list, steps: int, path: str, fault: str) -> AbstractProcess:
    """A recorder with as many ports as needed, its process and model classes defined where Lava looks for them."""
    name = "Recorder_%d_%d" % (len(messages), len(variables))
    if name not in globals():
        process = type(name, (RecorderBase,), {"__module__": __name__})
        members = {"port%d" % i: LavaPyType(PyInPort.VEC_DENSE, np.int32) for i in range(len(messages))}
        members.update({"reference%d" % i: LavaPyType(PyRefPort.VEC_DENSE, np.int32) for i in range(len(variables))})
        model = type(name + "_Model", (RecorderModelBase,), {"__module__": __name__, **members})
        model = tag("fixed_pt")(requires(CPU)(implements(proc=process, protocol=LoihiProtocol)(model)))
        globals()[name], globals()[name + "_Model"] = process, model
    return globals()[name](messages, variables, steps, path, fault)
