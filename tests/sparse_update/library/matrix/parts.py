"""What all loops share: two small models, their data, the settings of the gates, and how a model is compiled and called."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sparse_update.signals import Signal, register_signal
from tests.sparse_update.library.matrix.cells import Cell

B, T, V, WIDTH = 8, 12, 41, 16
STEPS, TURN = 4, 2
RATE, MOMENTUM, DECAY, CLIP, EMA = 0.2, 0.9, 0.5, 0.3, 0.75


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        mask = torch.full((h.shape[1], h.shape[1]), float("-inf"), device=h.device).triu(1)
        h = h + self.out((q @ k.transpose(1, 2) / WIDTH**0.5 + mask).softmax(-1).to(v.dtype) @ v)
        return h + self.down(torch.nn.functional.gelu(self.up(self.norm2(h))))


class Tiny(nn.Module):
    """Two blocks. `saving`: "", "checkpoint" or "checkpoint_reentrant"."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(V, WIDTH), nn.Embedding(T, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, V)
        self.saving = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            if self.saving:
                h = checkpoint(block, h, use_reentrant=self.saving == "checkpoint_reentrant")
            else:
                h = block(h)
        return self.head(h)


def built(gpt2: bool) -> nn.Module:
    """The model that all trainings of a kind begin with, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if not gpt2:
            model: nn.Module = Tiny()
            for p in model.parameters():
                p.data += torch.randn_like(p) * 0.1
            return model
        from transformers import GPT2Config, GPT2LMHeadModel

        cfg = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=V, n_positions=T, bos_token_id=0, eos_token_id=0)
        cfg.attn_pdrop = cfg.embd_pdrop = cfg.resid_pdrop = 0.0
        cfg.initializer_range = 0.2
        cfg._attn_implementation = "eager"
        model = GPT2LMHeadModel(cfg)
        return model.train()


def is_frozen(name: str) -> bool:
    """Layers that the feature "frozen" takes out of the training."""
    return name.startswith(("blocks.0.up", "transformer.h.0.mlp.c_fc")) or "wpe" in name or "place" in name


def is_slow(name: str) -> bool:
    """Parameters in the group with a quarter of the rate."""
    return name.startswith(("blocks.0.", "transformer.h.0.", "head"))


def batch(step: int, shifts: bool, count: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and labels (count B, T) int64 of a step; `shifts`: labels that are the inputs' own next tokens, -100 at the
    end."""
    tokens = torch.randint(0, V, (count * B, T + 1), generator=torch.Generator().manual_seed(50 + step))
    if not shifts:
        return tokens[:, :-1], tokens[:, 1:]
    x = tokens[:, :-1]
    return x, torch.cat((x[:, 1:], torch.full((len(x), 1), -100)), 1)


def logits_of(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def place_score(x: Tensor) -> Tensor:
    """(B, T), a number for each token and place that no precision changes."""
    return (x * 7919 + torch.arange(x.shape[1], device=x.device) * 104729 + x.roll(1, 0) * 31337) % 99991


@register_signal("by_token_and_place")
class ByTokenAndPlace(Signal):
    needs = "forward"

    def __init__(self, context: Any) -> None:
        super().__init__(context)

    def read(self, view: Any, batch: Any) -> Tensor:
        return place_score(batch.tokens[:, :-1]).float()


def config(cell: Cell) -> dict[str, Any]:
    """In float32 rows are chosen by their losses; in half precision, where losses round, by what does not."""
    if cell.gate == "strips":
        return {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4, "change_every_steps": TURN}}
    unit = "token" if cell.gate == "tokens" else "sequence"
    signal = {} if cell.precision == "fp32" else {"signal": "by_token_and_place"}
    return {"backward": {"unit": unit, "keep_fraction": 0.5, **signal}}


def model_of(cell: Cell) -> nn.Module:
    """A fresh model with what the cell's feature asks of it, not compiled."""
    model = built(cell.loop == "trainer")
    if cell.feature == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_(not is_frozen(name))
    if isinstance(model, Tiny) and cell.feature.startswith("checkpoint"):
        model.saving = cell.feature
    return model


def blocks_of(model: nn.Module) -> Iterable[nn.Module]:
    return model.blocks if isinstance(model, Tiny) else model.transformer.h  # type: ignore[return-value]


def compile_in_place(model: nn.Module, cell: Cell) -> None:
    for module in {"none": [], "whole": [model], "regional": blocks_of(model)}[cell.compile]:
        module.compile(backend=cell.backend)


def count_of(cell: Cell) -> int:
    """Batches of B sequences in a step."""
    return 2 if cell.feature == "accumulation" else 1


def parts_of(cell: Cell, step: int, rank: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What one process sees of a step: one batch, or two of the same size where gradients are accumulated."""
    count = count_of(cell)
    x, y = batch(step, False, count)
    if cell.loop in ("ddp", "fully_shard"):
        x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def groups_of(cell: Cell, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups, for which the optimizer has the rate RATE."""
    given = [(n.replace("_orig_mod.", ""), p) for n, p in named]
    if cell.feature != "groups":
        return [{"params": [p for _, p in given]}]
    slow, fast = [p for n, p in given if is_slow(n)], [p for n, p in given if not is_slow(n)]
    return [{"params": fast}, {"params": slow, "lr": RATE / 4}]


def optimizer_of(cell: Cell, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.SGD:
    return torch.optim.SGD(groups_of(cell, named), lr=RATE, momentum=MOMENTUM)


def schedule_of(cell: Cell, optimizer: Any) -> Any:
    """None, or a scheduler that halves the rates after every step."""
    if cell.feature != "schedule":
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step)


def average_of(model: nn.Module) -> Any:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))


def scaler_of(cell: Cell) -> torch.amp.GradScaler:
    """A scale at which nothing overflows, so that no step is left out."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=cell.precision == "fp16")


def lower(cell: Cell) -> contextlib.AbstractContextManager[Any]:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cell.precision]
    return contextlib.nullcontext() if cell.precision == "fp32" else torch.autocast("cpu", dtype=kind)


def call(cell: Cell, model: nn.Module, x: Tensor) -> Tensor:
    """The logits; the feature "functional_call" gives the parameters from outside."""
    if cell.feature == "functional_call":
        out = functional_call(model, dict(model.named_parameters()), (x,))
        return getattr(out, "logits", out)
    return logits_of(model, x)


def copy_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of the plain loss of a copy, which must have no gate. Resting weights are frozen in a copy too."""
    twin = copy.deepcopy(model).requires_grad_(True)
    assert not any("_spikegate_layer" in vars(m) for m in twin.modules())
    logits = logits_of(twin, x)
    nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100).backward()
    return {n: p.grad.double() for n, p in twin.named_parameters() if p.grad is not None}


def moved(named: Iterator[tuple[str, Tensor]], gpt2: bool) -> dict[str, Tensor]:
    """By how much parameters differ from where they began, float64, under their plain names."""
    start = dict(built(gpt2).named_parameters())
    found = {}
    for name, p in named:
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        plain = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("inner.").removeprefix("model.")
        found[plain] = whole.detach().double() - start[plain].detach().double()
    return found


class Loop:
    """A loop of one's own; what is made and how a model is called is for the loops that derive from it."""

    cell: Cell
    model: nn.Module
    called: Any
    gate: Any
    optimizer: torch.optim.SGD
    schedule: Any
    average: Any
    scaler: torch.amp.GradScaler
    rank = 0

    def step(self, step: int) -> None:
        parts = parts_of(self.cell, step, self.rank)
        for number, (x, y) in enumerate(parts):
            self._share(number == len(parts) - 1)
            with lower(self.cell):
                logits = call(self.cell, self.called, x)
                loss = self.gate.loss(logits, y, tokens=x)
            self.scaler.scale(loss / len(parts)).backward()
        if self.cell.feature == "clipping":
            self.scaler.unscale_(self.optimizer)
            self.gate.clip_grad_norm_(CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.gate.step(self.optimizer)
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _share(self, last: bool) -> None:
        """What comes before each part of a step, `last` before the last one; alone there is nothing to share."""

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "gate": self.gate, "optimizer": self.optimizer, "scaler": self.scaler}
