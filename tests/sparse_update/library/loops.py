"""A loop with clipping, two groups of parameters and a schedule, stopped, saved and taken up again."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from sparse_update.library.attach import attach
from sparse_update.transformer import ModelConfig, Transformer

T, V = 12, 41
ROWS = torch.randint(0, V, (16, 4, T + 1), generator=torch.Generator().manual_seed(1))
LAYERS = {"kind": "layers", "active_layers": 1, "change_every_steps": 2}
STRIPS = {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": 2}
COLUMNS = STRIPS | {"kind": "block_columns"}
CONFIGS = {
    "rotating rows": {"weights": STRIPS},
    "two random columns, sequences": {
        "weights": COLUMNS | {"strips": 2, "policy": "random"},
        "backward": {"unit": "sequence", "keep_fraction": 0.5},
    },
    "two scored rows, random tokens": {
        "weights": STRIPS | {"strips": 2, "policy": "energy"},
        "backward": {"unit": "token", "keep_fraction": 0.5, "signal": "random"},
    },
    "scored layers": {"weights": LAYERS | {"policy": "fisher"}},
    "random layers, random sequences": {
        "weights": LAYERS | {"policy": "random"},
        "backward": {"unit": "sequence", "keep_fraction": 0.5, "signal": "random"},
    },
    "all weights, random tokens": {"backward": {"unit": "token", "keep_fraction": 0.5, "signal": "random"}},
}
OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


def small():
    torch.manual_seed(0)
    return Transformer(ModelConfig(width=16, layers=2, heads=2, context=T, vocab_size=V, attention="explicit"))


def groups(named):
    """As trainers make them: matrices decay, the rest has another rate."""
    named = list(named)
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-2},
    ]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Loop:
    """Seven steps with clipping, two groups and a schedule. `made`: of whose parameters the optimizer is made."""

    def __init__(self, config, made="model", kind="AdamW", clip=0.5):
        self.model, self.clip = small(), clip
        self.gate = None if config is None else attach(self.model, config)
        self.made, self.kind = made, kind
        self.optimizer = self.schedule = None

    def make(self):
        source = self.model if self.made == "model" or self.gate is None else self.gate
        self.optimizer = OPTIMIZERS[self.kind](groups(source.named_parameters()))
        if self.made == "model" and self.gate is not None:
            self.gate.adopt(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        return self

    def run(self, steps):
        for x in ROWS[steps]:
            logits = self.model(x[:, :-1])
            if self.gate is None:
                nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
            else:
                self.gate.loss(logits, x[:, 1:]).backward()
            if self.clip:
                self.norm = (
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                    if self.gate is None
                    else self.gate.clip_grad_norm_(self.clip)
                )
            self.optimizer.step()
            if self.gate is not None:
                self.gate.step(self.optimizer)
            self.optimizer.zero_grad()
            self.schedule.step()
        return self

    def parts(self):
        return {"model": self.model, "gate": self.gate, "optimizer": self.optimizer, "schedule": self.schedule}

    def saved(self):
        return through_a_file({name: part.state_dict() for name, part in self.parts().items()})

    def load(self, state, *names):
        for name in names:
            self.parts()[name].load_state_dict(copy.deepcopy(state[name]))  # optimizers keep the tensors they are given
        return self
