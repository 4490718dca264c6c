"""What a deployment measures and how it is written down: held-out losses with intervals, layers, text, energy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.comparison.statistics import Interval, interval
from hardware.energy.account import Counts, EnergyReport
from neuro.analysis.tracing import evaluating
from neuro.conversion.plan import Plan
from neuro.deployment.deployed import deploy
from neuro.deployment.generation import generate
from neuro.deployment.sensitivity import layer_errors, one_at_a_time
from sparse_update.data.tokens import Tokenizer
from sparse_update.transformer import token_loss

EVAL_BATCH = 64
ERROR_BATCH = 4  # windows: every layer's inputs and outputs are held at a time

Advance = Callable[[int], object]


@dataclass(frozen=True)
class HeldOut:
    """Loss of one model on held-out windows: mean over tokens, means of the windows, wall seconds."""

    nats: float
    windows: tuple[float, ...]
    seconds: float

    @property
    def interval(self) -> dict[str, float | int | None]:
        """Mean with its 95 % t-interval over windows."""
        return bounds(interval(self.windows))

    def of(self, chosen: Tensor) -> HeldOut:
        """The same for some of the windows."""
        windows = tuple(self.windows[i] for i in chosen.tolist())
        return HeldOut(sum(windows) / len(windows), windows, self.seconds)

    def less(self, other: HeldOut) -> dict[str, float | int | None]:
        """Mean difference to another model on the same windows, with the paired 95 % t-interval."""
        return bounds(interval([a - b for a, b in zip(self.windows, other.windows, strict=True)]))


def bounds(found: Interval) -> dict[str, float | int | None]:
    """JSON form; `low` and `high` are None for one window."""
    return {"mean": found.mean, "low": found.low, "high": found.high, "windows": found.n}


def held_out_loss(
    model: nn.Module, windows_NT1: Tensor, advance: Advance | None = None, batch: int = EVAL_BATCH
) -> HeldOut:
    """Loss of a language model on windows, int64 (N, T + 1); `advance` is told how many tokens each batch had."""
    start = time.perf_counter()
    total, means = 0.0, list[float]()
    with evaluating(model):
        for part_BT1 in windows_NT1.split(batch):
            loss_BT = token_loss(model(part_BT1[:, :-1]), part_BT1[:, 1:]).double()
            total += float(loss_BT.sum())
            means += loss_BT.mean(dim=1).tolist()
            if advance is not None:
                advance(loss_BT.numel())
    return HeldOut(total / windows_NT1[:, 1:].numel(), tuple(means), time.perf_counter() - start)


def evenly(windows_NT1: Tensor, tokens: int) -> Tensor:
    """Windows of about `tokens` targets, spread evenly over all of them; at least one."""
    return windows_NT1[spread(windows_NT1, tokens)]


def spread(windows_NT1: Tensor, tokens: int) -> Tensor:
    """Which windows `evenly` takes, int64."""
    most, length = len(windows_NT1), windows_NT1.shape[1] - 1
    keep = min(most, max(1, tokens // length))
    return (2 * torch.arange(keep) + 1) * most // (2 * keep)


def in_mode_chip(
    model: nn.Module, plan: Plan, windows_NT1: Tensor, tokens: int, plain: HeldOut, lava: HeldOut, advance: Advance
) -> dict[str, Any]:
    """The plan again in the simulator's mode "chip": loss on some of the windows, against the same ones of the float model
    and of mode "lava", what left its register, and what the simulator says of the graphs.
    """
    chosen = spread(windows_NT1, tokens)
    deployed = deploy(model, plan, mode="chip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what it counts stands in the record
        found = held_out_loss(deployed, windows_NT1[chosen], advance)
    health = deployed.health()
    return {
        "tokens": windows_NT1[chosen][:, 1:].numel(),
        "loss_nats": found.nats,
        "interval": found.interval,
        "less_float": found.less(plain.of(chosen)),
        "less_lava": found.less(lava.of(chosen)),
        "wraps": sum(h.wraps for h in health),
        "saturations": sum(h.wide + h.payload_overflows for h in health),
        "notes": list(deployed.notes()),
    }


def errors_of_layers(model: nn.Module, plan: Plan, windows_NT1: Tensor) -> list[dict[str, Any]]:
    """Every segment's output against the float layer's, and what it sent per row."""
    found = layer_errors(model, plan, windows_NT1[:, :-1].split(ERROR_BATCH))
    return [asdict(error) for error in found]


def one_layer_at_a_time(
    model: nn.Module, plan: Plan, windows_NT1: Tensor, advance: Advance | None = None
) -> list[dict[str, Any]]:
    """Loss with each segment alone on the simulator, its difference to the float model, and the paired interval."""
    seen: list[HeldOut] = []

    def loss(module: nn.Module) -> float:
        seen.append(held_out_loss(module, windows_NT1, advance))
        return seen[-1].nats

    found = one_at_a_time(model, plan, loss, backend="fixed_point")
    plain = seen[0]
    return [asdict(f) | {"delta": own.less(plain)} for f, own in zip(found, seen[1:], strict=True)]


@dataclass(frozen=True)
class Sample:
    """Text that a model added to a prompt."""

    text: str
    tokens: tuple[int, ...]
    tokens_per_s: float


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Advance | None = None,
) -> Sample:
    """`tokens` more tokens of a text, one by one with the model's cache. Raises ValueError for an empty prompt."""
    (encoded,) = tokenizer.encode([prompt.encode()])
    prompt_T = torch.from_numpy(np.asarray(encoded).astype(np.int64))
    start = time.perf_counter()
    told = None if advance is None else (lambda new_B: advance(len(new_B)))
    whole_T = generate(model, prompt_T, tokens, temperature=temperature, seed=seed, on_token=told)
    seconds = time.perf_counter() - start
    new = whole_T[len(prompt_T) :].tolist()
    return Sample(tokenizer.decode(whole_T.numpy()).decode(errors="replace"), tuple(new), tokens / seconds)


def samples_markdown(samples: dict[str, Sample]) -> str:
    """Texts under the names of their models."""
    return "\n\n".join(f"{name}\n\n```\n{found.text}\n```" for name, found in samples.items())


def layer_record(counts: Counts, tokens: int) -> dict[str, Any]:
    """One layer's counts per token."""
    totals = ("synops", "events", "neuron_updates_active", "neuron_updates_inactive", "dense_macs")
    raw = asdict(counts)
    rest = {key: value for key, value in raw.items() if key not in totals and key != "tokens"}
    return rest | {f"{key}_per_token": raw[key] / tokens for key in totals}


def per_token(report: EnergyReport, missing: str) -> dict[str, Any]:
    """An energy report with its joules, total, by term and layer, divided by tokens; `missing` joins what is not known."""
    whole = report.to_dict()
    whole |= {"unknown": [*whole["unknown"], missing], "lower_bound": True, "scope": "layers on the chip"}
    scaled = {key: whole[key] / report.tokens for key in ("low_j", "mid_j", "high_j")}
    terms = {term: [value / report.tokens for value in triple] for term, triple in report.by_term().items()}
    layers = {
        layer: {group: [value / report.tokens for value in triple] for group, triple in groups.items()}
        for layer, groups in report.by_layer().items()
    }
    return whole | scaled | {"per": "token", "terms": terms, "by_layer": layers}


def energy_markdown(reports: Sequence[EnergyReport]) -> str:
    """Where each joule comes from, as a Markdown table."""
    rows = ["| profile | term | low nJ/token | mid | high | source |", "|---|---|---|---|---|---|"]
    for report in reports:
        for term, values in report.by_term().items():
            cells = " | ".join(f"{1e9 * v / report.tokens:,.1f}" for v in values)
            rows.append(f"| {report.profile} | {term} | {cells} | {report.source} |")
        rows += [f"| {report.profile} | not known | - | - | - | {reason} |" for reason in report.unknown]
        rows += [f"| {report.profile} | label | - | - | - | {label} |" for label in report.labels]
    return "\n".join(rows)


def losses_text(document: dict[str, Any]) -> str:
    """Three losses, differences to the float model, and operations, for people."""
    lines = [f"{'nats per token':<16}{'loss':>9}{'95 % over windows':>20}{'less float':>12}{'95 %, paired':>20}"]
    for name in ("float", "quantised", "simulated"):
        own, less = document[f"loss_{name}_interval"], document.get(f"delta_{name}")
        difference = f"{less['mean']:>+12.4f}{_range(less, '+'):>20}" if less else ""
        lines.append(f"{name:<16}{own['mean']:>9.4f}{_range(own):>20}{difference}")
    return "\n".join(
        [
            *lines,
            f"{document['synops_per_token']:,.0f} synaptic operations a token, {document['synops_fraction']:.1%} of "
            f"{document['mapped_macs_per_token']:,.0f} dense MACs on the chip ({document['mapped_mac_share']:.1%} of all); "
            f"{document['events_per_token']:,.0f} events; {document['clipped_inputs']:,} clipped inputs, "
            f"{document['saturations']:,} saturations, {document['wraps']:,} wraps",
            *_mode_chip_text(document),
        ]
    )


def _mode_chip_text(document: dict[str, Any]) -> Iterator[str]:
    found = document.get("mode_chip")
    if not found:
        return
    less = found["less_lava"]
    yield (
        f"mode chip: {found['loss_nats']:.4f} nats, {less['mean']:+.4f} {_range(less, '+')} against mode lava on the same "
        f"{found['tokens']:,} tokens; {found['saturations']:,} saturations, {found['wraps']:,} wraps"
    )
    lossy = [note for note in found["notes"] if "acts on each synapse" in note]
    if lossy:
        remedy = "; conversion.narrow=neuron avoids it" if document["route"] == "graded" else ""
        yield f"  weights lose bits in {len(lossy)} projections there{remedy}. First: {lossy[0]}"


def _range(found: dict[str, Any], sign: str = "") -> str:
    return "-" if found["low"] is None else f"[{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]"


def layers_markdown(errors: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> str:
    """Per segment: error of its output, what it sends, and the loss where it alone is converted."""
    return "\n".join(_layer_rows(errors, {found["segment"]: found for found in alone}))


def _layer_rows(errors: Sequence[dict[str, Any]], alone: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| segment | error, all converted | error, its own | events/row | synops/row | nats, it alone | 95 % |"
    yield "|---|---|---|---|---|---|---|"
    for e in errors:
        one = alone.get(e["segment"])
        loss = f"{one['delta']['mean']:+.5f} | {_range(one['delta'], '+')}" if one else "- | -"
        yield (
            f"| {e['segment']} | {e['relative_rms']:.2%} | {e['own_relative_rms']:.2%} | {e['events_per_row']:,.0f} | "
            f"{e['synops_per_row']:,.0f} | {loss} |"
        )
