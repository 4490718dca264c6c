"""Times float simulators: `python float_peers.py REQUEST`, in an environment with torch, SpikingJelly, snnTorch and norse.

It imports nothing of ours. REQUEST is a JSON file:

"peer": one of PEERS;
"file": an npz with "x" uint8 (steps, batch, ...) and float32 weights "w0", "w1", ... in torch's layout;
"layers": for each of them {"kind": "linear"} or {"kind": "conv", "stride": [2], "padding": [2]};
"keep_u", "keep_v": what is left of current and voltage after a step;
"firing": share of updates that each layer is to fire at;
"threads"; "least_s"; "clock": "wall", or "cpu" for the seconds of this process alone;
"facts": a file, into which go {"firing": [per layer, over the whole input], "first_s": seconds of the first call,
"versions": {package: version}} as JSON.

Then every line at stdin is answered by a line `SECONDS x`: the median of one run of the network, over runs of at least
`least_s` seconds. What fails ends the process with a traceback.

Every peer runs as its own documentation runs it for speed: SpikingJelly in multi-step mode, snnTorch in its loop over
steps, norse as a lifted sequence; all in inference mode, float32, from rest. Thresholds are found layer by layer, so that
each layer fires as asked, or as near to it as the reset of that peer allows. Before anything is timed, the whole network
must give the spikes that its layers gave one by one.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DT_S = 1e-3
"""norse's step. Its parameters are rates; only their product with the step counts."""
SAMPLE = (64, 4)
"""Steps and samples that thresholds are found on, at most;"""
SAMPLE_VALUES = 2**21
"""fewer samples, down to one, where a layer would send more values than that."""
HALVINGS = 24


class Peer:
    """A float simulator: its neuron, one layer of it alone, and a whole network the way its makers run one fast."""

    packages: tuple[str, ...] = ("torch",)
    has_threshold = True

    def __init__(self, keep_u: float, keep_v: float) -> None:
        self.keep_u, self.keep_v = keep_u, keep_v

    def neuron(self, threshold: float) -> Any:
        """One layer of neurons, of any shape."""
        raise NotImplementedError

    def fire(self, neuron: Any, current: Tensor) -> Tensor:
        """Spikes (steps, batch, ...) of one layer from rest, for what arrives at it."""
        raise NotImplementedError

    def network(self, synapses: list[nn.Module], neurons: list[Any]) -> Callable[[Tensor], Tensor]:
        """The last layer's spikes (steps, batch, ...) as a function of the input's, from rest at every call."""
        raise NotImplementedError


class SpikingJelly(Peer):
    """CUBALIFNode, which has our equations: a synaptic current and a voltage, set to 0 by a spike; multi-step mode."""

    packages = ("spikingjelly", "torch")

    def neuron(self, threshold: float) -> Any:
        from spikingjelly.activation_based import neuron

        made = neuron.CUBALIFNode(self.keep_u, self.keep_v, v_threshold=threshold, v_reset=0.0)
        made.step_mode = "m"
        return made

    def fire(self, neuron: Any, current: Tensor) -> Tensor:
        neuron.reset()
        return neuron(current)

    def network(self, synapses: list[nn.Module], neurons: list[Any]) -> Callable[[Tensor], Tensor]:
        from spikingjelly.activation_based import functional, layer

        parts: list[nn.Module] = []
        for synapse, neuron in zip(synapses, neurons, strict=True):
            made: nn.Module
            if isinstance(synapse, nn.Conv2d):
                made = layer.Conv2d(
                    synapse.in_channels,
                    synapse.out_channels,
                    synapse.kernel_size,
                    stride=synapse.stride,
                    padding=synapse.padding,
                    bias=False,
                )
            else:
                assert isinstance(synapse, nn.Linear)
                if any(isinstance(part, layer.Conv2d) for part in parts) and not any(
                    isinstance(part, layer.Flatten) for part in parts
                ):
                    parts.append(layer.Flatten())
                made = layer.Linear(synapse.in_features, synapse.out_features, bias=False)
            made.load_state_dict(synapse.state_dict())
            parts += [made, neuron]
        net = nn.Sequential(*parts)
        functional.set_step_mode(net, "m")

        def run(x: Tensor) -> Tensor:
            functional.reset_net(net)
            return net(x)

        return run


class SpikingJellyLif(SpikingJelly):
    """LIFNode: a voltage alone, without a synaptic current; less work than ours."""

    def neuron(self, threshold: float) -> Any:
        from spikingjelly.activation_based import neuron

        return neuron.LIFNode(
            tau=1 / (1 - self.keep_v), decay_input=False, v_threshold=threshold, v_reset=0.0, step_mode="m"
        )


class SnnTorch(Peer):
    """Synaptic: a current and a voltage, set to 0 one step after the spike."""

    packages = ("snntorch", "torch")

    def neuron(self, threshold: float) -> Any:
        import snntorch

        return snntorch.Synaptic(alpha=self.keep_u, beta=self.keep_v, threshold=threshold, reset_mechanism="zero")

    def start(self, neuron: Any) -> tuple[Any, ...]:
        return neuron.reset_mem()

    def fire(self, neuron: Any, current: Tensor) -> Tensor:
        state, out = self.start(neuron), []
        for step in current:
            spikes, *state = neuron(step, *state)
            out.append(spikes)
        return torch.stack(out)

    def network(self, synapses: list[nn.Module], neurons: list[Any]) -> Callable[[Tensor], Tensor]:
        layers = list(zip(synapses, neurons, strict=True))

        def run(x: Tensor) -> Tensor:
            states, out = [self.start(neuron) for neuron in neurons], []
            for step in x:
                for at, (synapse, neuron) in enumerate(layers):
                    step, *states[at] = neuron(synapse(flat_for(synapse, step)), *states[at])
                out.append(step)
            return torch.stack(out)

        return run


class SnnTorchLif(SnnTorch):
    """Leaky: a voltage alone."""

    def neuron(self, threshold: float) -> Any:
        import snntorch

        return snntorch.Leaky(beta=self.keep_v, threshold=threshold, reset_mechanism="zero")

    def start(self, neuron: Any) -> tuple[Any, ...]:
        return (neuron.reset_mem(),)


class Norse(Peer):
    """LIF: a current and a voltage; a lifted sequence, layer by layer over all steps."""

    packages = ("norse", "torch")

    def neuron(self, threshold: float) -> Any:
        import norse.torch as norse

        rates = ((1 - self.keep_u) / DT_S, (1 - self.keep_v) / DT_S)
        p = norse.LIFParameters(
            tau_syn_inv=torch.tensor(rates[0]),
            tau_mem_inv=torch.tensor(rates[1]),
            v_th=torch.tensor(threshold),
            v_reset=torch.tensor(0.0),
        )
        return norse.LIF(p, dt=DT_S)

    def fire(self, neuron: Any, current: Tensor) -> Tensor:
        return neuron(current)[0]

    def network(self, synapses: list[nn.Module], neurons: list[Any]) -> Callable[[Tensor], Tensor]:
        import norse.torch as norse

        parts: list[nn.Module] = []
        for before, synapse, neuron in zip([None, *synapses], synapses, neurons, strict=False):
            if isinstance(before, nn.Conv2d) and isinstance(synapse, nn.Linear):
                parts.append(nn.Flatten(2))
            parts += [norse.Lift(synapse), neuron]
        net = norse.SequentialState(*parts)
        return lambda x: net(x)[0]


class Products(Peer):
    """No simulator: the products of all layers alone, on spikes as rare as asked. Nothing that does them is faster."""

    has_threshold = False

    def network(self, synapses: list[nn.Module], neurons: list[Any]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for synapse, given in zip(synapses, [x, *neurons], strict=True):
                x = apart(synapse, given)
            return x

        return run


PEERS: dict[str, type[Peer]] = {
    "spikingjelly": SpikingJelly,
    "spikingjelly_lif": SpikingJellyLif,
    "snntorch": SnnTorch,
    "snntorch_lif": SnnTorchLif,
    "norse": Norse,
    "products": Products,
}


def flat_for(synapse: nn.Module, x: Tensor) -> Tensor:
    """Flattened over channels and picture, in front of a dense layer that follows a convolution."""
    return x.flatten(1) if isinstance(synapse, nn.Linear) and x.dim() > 2 else x


def apart(synapse: nn.Module, x: Tensor) -> Tensor:
    """What all steps (steps, batch, ...) deliver, in one product."""
    flat = flat_for(synapse, x.flatten(0, 1))
    return synapse(flat).unflatten(0, x.shape[:2])


def synapses_of(layers: list[dict[str, Any]], archive: Any) -> list[nn.Module]:
    """nn.Linear or nn.Conv2d of each layer, without biases."""
    made: list[nn.Module] = []
    for at, layer in enumerate(layers):
        weight = torch.from_numpy(archive[f"w{at}"]).float()
        module: nn.Linear | nn.Conv2d
        if layer["kind"] == "conv":
            out, inwards, width, height = weight.shape
            stride, padding = tuple(layer["stride"]), tuple(layer["padding"])
            module = nn.Conv2d(inwards, out, (width, height), stride, padding, bias=False)
        else:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.copy_(weight)
        made.append(module)
    return made


def threshold_for(peer: Peer, current: Tensor, firing: float) -> float:
    """Threshold at which a layer fires at `firing`, by halving; `current` (steps, batch, ...)."""
    low, high = 0.0, 64 * float(current.abs().max()) + 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fired = float(peer.fire(peer.neuron(middle), current).mean())
        low, high = (middle, high) if fired > firing else (low, middle)
    return high


def build(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The facts, and the call that is timed."""
    torch.set_num_threads(request["threads"])
    peer = PEERS[request["peer"]](request["keep_u"], request["keep_v"])
    with np.load(request["file"], allow_pickle=False) as archive:
        x = torch.from_numpy(archive["x"]).float()
        synapses = synapses_of(request["layers"], archive)
    spikes, neurons, rates = x, [], []
    for at, (synapse, firing) in enumerate(zip(synapses, request["firing"], strict=True)):
        current = apart(synapse, spikes)
        if peer.has_threshold:
            samples = max(1, SAMPLE_VALUES // current[: SAMPLE[0], 0].numel())
            sample = current[: SAMPLE[0], : min(samples, SAMPLE[1])].contiguous()
            neurons.append(peer.neuron(threshold_for(peer, sample, firing)))
            spikes = peer.fire(neurons[-1], current).clone()
        else:
            spikes = (torch.rand(current.shape, generator=torch.Generator().manual_seed(at)) < firing).float()
            neurons.append(spikes)
        rates.append(float(spikes.mean()))
    if not peer.has_threshold:
        neurons.pop()
    run = peer.network(synapses, neurons)
    begin = time.perf_counter()
    found = run(x)
    first_s = time.perf_counter() - begin
    same = float((found != spikes).float().mean()) if peer.has_threshold else 0.0
    if same > 1e-3:  # sums in another order may put a few neurons on the other side of their threshold
        raise RuntimeError(f"the network's spikes are not those of its layers: {same:.2%} differ")
    versions = {name: importlib.metadata.version(name) for name in peer.packages}
    return {"firing": rates, "first_s": first_s, "versions": versions}, lambda: run(x)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def median_s(call: Callable[[], Any], least_s: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of one call, over calls of at least `least_s` seconds."""
    seconds: list[float] = []
    while not seconds or sum(seconds) < least_s:
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return statistics.median(seconds)


def serve(build: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[], Any]]]) -> None:
    """Read the request that the command line names, write its facts, then answer every line at stdin with seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries talk
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    facts, call = build(request)
    Path(request["facts"]).write_text(json.dumps(facts), encoding="utf-8")
    for _ in sys.stdin:
        print("SECONDS", median_s(call, request["least_s"], CLOCKS[request["clock"]]), file=answers, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        serve(build)
