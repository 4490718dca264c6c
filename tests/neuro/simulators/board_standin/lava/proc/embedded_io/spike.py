"""Stand-in for the adapters between host and neuro cores: pass on what comes, and check that it fits the message."""

import numpy as np
from lava.magma.core.decorator import implements, requires
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class Adapter(AbstractProcess):
    def __init__(self, shape, num_message_bits=0):
        super().__init__(shape=shape, num_message_bits=num_message_bits)
        assert 0 <= num_message_bits <= 32
        self.inp, self.out = InPort(shape=shape), OutPort(shape=shape)


class PyToNxAdapter(Adapter):
    pass


class NxToPyAdapter(Adapter):
    pass


class PassOn(PyLoihiProcessModel):
    inp: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32)

    def __init__(self, proc_params):
        super().__init__(proc_params)
        bits = proc_params["num_message_bits"]
        self.low, self.high = (0, 1) if bits == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def run_spk(self):
        message = self.inp.recv()
        assert message.min() >= self.low, "a message below its width"
        assert message.max() <= self.high, "a message above its width"
        self.out.send(message)


@implements(proc=PyToNxAdapter, protocol=LoihiProtocol)
@requires(CPU)
class PyToNx(PassOn):
    pass


@implements(proc=NxToPyAdapter, protocol=LoihiProtocol)
@requires(CPU)
class NxToPy(PassOn):
    pass
