# %% [markdown]
# # A snnTorch network on the chip
#
# A spiking classifier of handwritten digits is trained with snnTorch, turned into integers, and run in a simulator of the
# chip's arithmetic. Does the integer network still know its digits? How many cores does it take? What does one image cost?
# It takes about fifteen seconds on one core and downloads nothing: the images come with scikit-learn.

# %%
from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt
import snntorch
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from experiments.views.chip_figure import chip_figure
from experiments.views.rasters import raster_figure
from neuro import graph_account
from neuro.conversion.lif import convert_lif
from neuro.modules.spiking import count_loss, predicted, rate_code
from neuro.simulators import snntorch_backend
from neuro.simulators.fixed_point import simulate

FOLDER = Path(os.environ.get("SPIKEGATE_EXAMPLES", "runs/examples"))
FOLDER.mkdir(parents=True, exist_ok=True)
STEPS = 16  # time steps of an image
plt.switch_backend(plt.get_backend())  # from here on a notebook shows figures as pictures
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The images
#
# 1,797 images of 8 x 8 pixels. A pixel becomes a train of spikes, the more the brighter it is. A quarter of the images is
# held out, the same share of every digit.

# %%
digits = load_digits()
train, test = train_test_split(range(len(digits.target)), test_size=450, stratify=digits.target, random_state=0)
x = rate_code(torch.from_numpy(digits.data).float() / 16, STEPS)  # (images, steps, pixels), 0 or 1
y = torch.from_numpy(digits.target).long()
print(f"{len(train)} images to train on, {len(test)} held out, {x.mean():.0%} of the input spikes are there")

# %% [markdown]
# ## The network
#
# Two linear layers with snnTorch's `Leaky` neurons. The chip sets a neuron to zero at once when it spikes, and so
# must the network that is trained: `reset_mechanism="zero"` and `reset_delay=False`.


# %%
class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        chip = {"beta": 0.9, "reset_mechanism": "zero", "reset_delay": False}
        self.fc1, self.lif1 = nn.Linear(64, 64), snntorch.Leaky(**chip)
        self.fc2, self.lif2 = nn.Linear(64, 10), snntorch.Leaky(**chip)

    def forward(self, x_BTF: Tensor) -> Tensor:
        """Spikes of the last layer, (images, steps, classes)."""
        v1, v2 = torch.zeros(len(x_BTF), 64), torch.zeros(len(x_BTF), 10)
        spikes = []
        for x_BF in x_BTF.unbind(1):
            hidden, v1 = self.lif1(self.fc1(x_BF), v1)
            out, v2 = self.lif2(self.fc2(hidden), v2)
            spikes.append(out)
        return torch.stack(spikes, dim=1)


network = Network()
epochs, batch = 10, 64
steps = epochs * -(-len(train) // batch)
optimizer = torch.optim.Adam(network.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
order = torch.tensor(train)
for _ in range(epochs):
    for rows in order[torch.randperm(len(order))].split(batch):
        loss = count_loss(network(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

# %% [markdown]
# ## Integers
#
# `convert_lif` finds integer weights, thresholds and decays such that no input can make a register run over. `simulate`
# then runs them with the chip's arithmetic, twice: as Intel's Lava does it, and as published emulators of the chip do it.
# snnTorch runs the same integers as a second opinion.


# %%
def accuracy(spikes_BTC: Tensor) -> float:
    return float((predicted(spikes_BTC) == y[test]).double().mean())


with torch.no_grad():
    print(f"float network             {accuracy(network(x[test])):.1%} right")
integers = convert_lif([(network.fc1, network.lif1), (network.fc2, network.lif2)], steps=STEPS)
print(integers.table())
inputs = integers.present(x[test])
activity = simulate(integers.graph, inputs, strict=True)
chip = simulate(integers.graph, inputs, mode="chip", strict=True)
second = snntorch_backend.run(integers.graph, inputs)
for run in (activity, chip, second):
    print(f"{run.ran_on:25} {accuracy(integers.collect(run.spikes['layer2'])):.1%} right")
same = torch.equal(activity.spikes["layer2"], chip.spikes["layer2"])
print(f"Lava's arithmetic and the emulators': {'the same spikes' if same else 'different spikes'}")

# %% [markdown]
# ## The spikes
#
# One image from the pixels to the classes. Each layer answers one step later than the layer before it.

# %%
image = inputs["x"][:1]
spikes = simulate(integers.graph, {"x": image}, record=("spikes",)).spikes
raster = raster_figure(
    {"pixels": image, "hidden": spikes["layer1"], "classes": spikes["layer2"]},
    f"a {int(y[test[0]])}, recognised as a {int(predicted(integers.collect(spikes['layer2'])))}",
)
raster.savefig(FOLDER / "spiking_digits_raster.png", dpi=150)
raster

# %% [markdown]
# ## The account
#
# One call runs the graph and says what it costs: every synaptic operation, message and update of a neuron is counted; the
# cores of a Loihi 1 chip, the joules and the microseconds are modelled from the counts, each with its source. Each figure
# stands with what it takes for granted. `spikegate account GRAPH INPUT --chip loihi1` prints the same of files.

# %%
found = graph_account(integers.graph, inputs, chip="loihi1")
assert found.placement is not None
print(found.placement)
cores = chip_figure(found.placement)
cores.savefig(FOLDER / "spiking_digits_cores.png", dpi=150)
cores

# %% [markdown]
# No chip was measured here, so energy is "modelled" and has an interval. Static power needs a time, which the latency model
# gives for these cores; it is the larger part by far. The dense equivalent stands beside it twice: evaluated once an image,
# as a network without spikes would be, and in every time step. It counts arithmetic and memory reads and no static power.

# %%
print(found.table())
print(f"pictures: {FOLDER / 'spiking_digits_raster.png'}, {FOLDER / 'spiking_digits_cores.png'}")
