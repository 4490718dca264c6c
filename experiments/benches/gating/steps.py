"""Dense steps of several makes and gated steps of every kind, each with its optimizer's, on one batch of one model.

Shape letters: B batch, T token, S kept sequence, R kept row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.benches.nanogpt import PlainGPT
from sparse_update.step.backward import Stepper
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, Choose, Chosen, StepPlan, View
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active, SubsetConfig, choose

KINDS = ("sequence_before", "sequence_after", "token_rows", "bypass", "blocks", "layers", "dw_rows")
EXTRA = ("token_rows_exact", "bypass_keys", "vcas", "layers_frozen")
"""Further kinds. "layers_frozen": embeddings frozen too, so that the backward ends early."""
Step = Callable[[], None]


@dataclass
class Arm:
    """One kind of step. `turn` moves the choice of weights on before a step, where there is one to move."""

    step: Step
    flops: Callable[[], int]
    turn: Callable[[int], None] | None = None
    every: int = 1
    """Steps that one choice of weights lasts: the share of `turn` that a step pays."""
    cycle: int = 1
    """Turns over which the cost of a step has to be averaged, since it depends on the turn."""


@dataclass(frozen=True)
class How:
    """Which of our dense steps the gated ones are built like."""

    attention: str = "explicit"
    precision: str = "fp32"
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.attention}/{self.precision}/{'compiled' if self.compiled else 'eager'}"


class Steps:
    """Steps of one model shape on (batch, context) random tokens."""

    def __init__(self, cfg: ModelConfig, batch: int, device: torch.device, block_rows: int) -> None:
        self.cfg, self.device, self.block_rows = cfg, device, block_rows
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, cfg.vocab_size, (batch, cfg.context + 1), generator=generator).to(device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.models = {a: self._model(a) for a in ("explicit", "sdpa")}
        self.optim = OptimConfig(lr=1e-5)
        self.optimizers = {a: Optimizer(m, Active.everything(m), self.optim) for a, m in self.models.items()}

    def _model(self, attention: str) -> Transformer:
        model = Transformer(ModelConfig(**{**asdict(self.cfg), "attention": attention})).to(self.device)
        with torch.no_grad():
            for p in model.parameters():  # nothing at zero, as after some training
                p.add_(0.02 * torch.randn_like(p))
        return model

    # dense steps

    def dense(self, name: str) -> Step:
        """A dense step by its name: make / attention / precision / eager or compiled; see `names`."""
        make, attention, precision, mode = name.split("/")
        how = How(attention, precision, mode == "compiled")
        if make == "plain gpt":
            return self._plain(how)
        return self._autograd(how) if make == "autograd" else self.stepped(how, PLAIN)

    def _cast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _plain(self, how: How) -> Step:
        cfg = self.cfg
        model = PlainGPT(cfg.width, cfg.layers, cfg.heads, cfg.context, cfg.vocab_size, cfg.hidden_ratio).to(self.device)
        run = torch.compile(model) if how.compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.1, fused=True)

        def step() -> None:
            with self._cast(how.precision):
                loss = run(self.x, self.y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _autograd(self, how: How) -> Step:
        model, optimizer = self.models[how.attention], self.optimizers[how.attention]
        run = torch.compile(model) if how.compiled else model

        def step() -> None:
            with self._cast(how.precision):
                loss = token_loss(run(self.x), self.y).mean()
            loss.backward()
            optimizer.step(0.5)

        return step

    def stepped(
        self,
        how: How,
        plan: StepPlan,
        choose_after: Choose | None = None,
        batch: int = 0,
        bypass_BR: Tensor | None = None,
        optimizer: Optimizer | None = None,
    ) -> Step:
        """A step by the written-out engine."""
        model = self.models[how.attention]
        stepper = Stepper(model, torch.bfloat16 if how.precision == "bf16" else None, how.compiled)
        optimizer = optimizer or self.optimizers[how.attention]
        x, y = (self.x[:batch], self.y[:batch]) if batch else (self.x, self.y)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            found = stepper.step(
                x, y, plan, optimizer.active, choose=choose_after, bypass_BR=bypass_BR, generator=generator
            )
            optimizer.set_gradients(found.gradients)
            optimizer.step(0.5)

        return step

    # gated steps

    def arm(self, kind: str, rate: float, how: How) -> Arm:
        """The step of one kind at one kept share."""
        batch, length, layers = len(self.x), self.cfg.context, self.cfg.layers
        rows, sequences = max(1, round(rate * length)), max(1, round(rate * batch))
        if kind in ("blocks", "layers", "layers_frozen"):
            return self._subset_arm(kind, rate, how)
        if kind == "sequence_before":
            return self._plan_arm(how, PLAIN, batch=sequences)
        if kind == "sequence_after":
            return self._plan_arm(how, StepPlan(sequences=sequences), _top_sequences(sequences))
        if kind in ("token_rows", "token_rows_exact"):
            return self._plan_arm(how, StepPlan(rows=rows, rows_exact=kind == "token_rows_exact"), _top_rows(rows))
        if kind in ("bypass", "bypass_keys"):
            draws = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :rows]
            through = draws.sort(1).values.to(self.device)
            return self._plan_arm(how, StepPlan(bypass=rows, bypass_keys=kind == "bypass_keys"), bypass_BR=through)
        if kind == "vcas":
            shares = tuple(rate ** ((layers - layer) / layers) for layer in range(layers))
            return self._plan_arm(how, StepPlan(sample=shares, dw_rows=rate))
        return self._plan_arm(how, StepPlan(dw_rows=rate))

    def _plan_arm(
        self,
        how: How,
        plan: StepPlan,
        choose_after: Choose | None = None,
        batch: int = 0,
        bypass_BR: Tensor | None = None,
    ) -> Arm:
        step = self.stepped(how, plan, choose_after, batch, bypass_BR)
        total = plan_flops(self.cfg, batch or len(self.x), plan).total
        return Arm(step, lambda: total)

    def _subset_arm(self, kind: str, rate: float, how: How) -> Arm:
        model = self.models[how.attention]
        cfg = SubsetConfig(
            kind="blocks" if kind == "blocks" else "layers",
            active_fraction=rate,
            block_rows=min(self.block_rows, max(1, round(self.cfg.width * rate))),
            train_embeddings=kind != "layers_frozen",
        )
        optimizer = Optimizer(model, choose(model, cfg, 0, 0), self.optim)
        step = self.stepped(how, PLAIN, optimizer=optimizer)
        return Arm(
            step,
            lambda: plan_flops(self.cfg, len(self.x), PLAIN, optimizer.active).total,
            lambda turn: optimizer.activate(choose(model, cfg, turn, 0)),
            cfg.change_every_steps,
            self.cfg.layers if kind == "layers_frozen" else 1,
        )


def names(precisions: tuple[str, ...], compiled: bool) -> list[str]:
    """Every dense step worth naming."""
    found = []
    for precision in precisions:
        for mode in ("eager", "compiled") if compiled else ("eager",):
            found.append(f"plain gpt/sdpa/{precision}/{mode}")
            found += [f"{make}/{a}/{precision}/{mode}" for a in ("explicit", "sdpa") for make in ("autograd", "stepper")]
    return found


def bf16_pays() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; elsewhere it is emulated, several times slower than
    float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _top_sequences(count: int) -> Choose:
    return lambda view: Chosen(sequences_S=view.loss_BT.mean(1).topk(count).indices.sort().values)


def _top_rows(count: int) -> Choose:
    def choose_rows(view: View) -> Chosen:
        return Chosen(rows_SR=view.loss_BT.topk(count, dim=1).indices.sort(dim=1).values)

    return choose_rows
