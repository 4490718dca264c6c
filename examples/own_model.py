# %% [markdown]
# # Does it pay on my model?
#
# A Llama from Hugging Face on the reference manual that comes with Python. Should its backward leave out the half of the
# token rows that surprise it least? One call answers with all that such a claim needs: plain training, the gate, and as
# many rows by chance, each for the same counted seconds. It takes less than half a minute and downloads nothing.

# %%
from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from experiments import UserTask, does_it_pay

FOLDER = Path(os.environ.get("SPIKEGATE_EXAMPLES", "runs/examples"))
LENGTH = 64
torch.set_num_threads(1)

# %% [markdown]
# ## The parts
#
# The loader gives mappings as Hugging Face's models take them. Everything else about the training is named once: the model
# as a function, so that each seed has weights of its own, the optimizer, and how its rate falls with the budget.

# %%
BYTES = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.long)
ROWS = BYTES[: len(BYTES) // LENGTH * LENGTH].view(-1, LENGTH)
ORDER = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))
HELD_OUT, TRAINING = ROWS[ORDER[:64]], ROWS[ORDER[64:]]


def batches(rows: torch.Tensor, shuffle: bool) -> DataLoader[Any]:
    return DataLoader([{"input_ids": row} for row in rows], batch_size=8, shuffle=shuffle)  # type: ignore[arg-type]


def model() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


TASK = UserTask(
    model=model,
    train=batches(TRAINING, shuffle=True),
    held_out=batches(HELD_OUT, shuffle=False),
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
    schedule=lambda spent: min(1.0, 20 * spent + 0.05) * (1 - 0.9 * spent),
    name="llama",
    bytes_per_token=1.0,
)

# %% [markdown]
# ## The question
#
# `budget_steps` is what plain training takes for so many steps; the others get the same seconds and take what steps they
# can. The clock counts what every step does, the choice of its rows too, at prices that come with the package. With
# `clock="measured"` it times the products of these very arms on your machine first.

# %%
found = does_it_pay(
    TASK,
    {"backward": {"unit": "token", "keep_fraction": 0.5, "policy_options": {"noise_cut": 0.05}}},
    seeds=[0, 1],
    budget_steps=100,
    clock="modelled",
    folder=FOLDER / "own_model",
    evaluations=4,
    progress=False,
    tensorboard=False,
)

# %% [markdown]
# ## The answer
#
# The table and the sentences are those that `spikegate compare` prints for any run. A model this small pays more for the
# choice than it saves in products; the page under `own_model/comparison` holds everything.

# %%
for arm, step in found["steps"].items():
    print(f"{arm:<7} {step['counted_over_dense']:.2f} of a plain step by the clock")
arms = {name: record for name, record in found["streams"]["llama"].items() if "loss_nats_by_seed" in record}
picture, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
for place, record in enumerate(arms.values()):
    axes.plot(list(record["loss_nats_by_seed"].values()), [place] * record["n"], "o", color="#0072B2", alpha=0.7)
axes.set_yticks(range(len(arms)), list(arms))
axes.set_ylim(len(arms) - 0.5, -0.5)
axes.set_xlabel("held-out loss, nats a byte (a dot: one seed)")
axes.set_title("equal counted seconds", loc="left", fontsize=10)
picture.savefig(FOLDER / "own_model.png", dpi=150)
print(f"picture: {FOLDER / 'own_model.png'}")
