"""`python -m experiments.bench generation`: tokens a second of our sampler beside Hugging Face's `generate`.

Both have the same weights, prompts, number of outputs and stop tokens, and draw from the whole vocabulary at temperature 1
(the case `one` takes the likeliest token). A measurement is seconds for each token that came out, the stop token included,
in turn (`hardware.meters.ratios`); the ratio is theirs over ours, so 2 means twice the tokens a second. Before anything is
timed, the logits of both are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benches import ratios
from experiments.benches.generating.peer import PEERS, exported, padded, theirs
from experiments.runs.folder import git_state, versions
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from hardware.meters.ratios import InTurn, Probe, processor
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.transformer import ModelConfig, Transformer

TARGET = 2.0
"""Tokens a second over theirs, at least."""
OURS, THEIRS = "ours", "hugging_face"
SIZES = {
    "tiny": {"width": 64, "layers": 3, "heads": 4, "context": 128},
    "mid": {"width": 128, "layers": 3, "heads": 4, "context": 128},
    "small": {"width": 256, "layers": 6, "heads": 8, "context": 256},
}
VOCAB = 256
CLOSE = 1e-3
"""Largest difference of logits at which the two are the same model."""


@dataclass(frozen=True)
class Case:
    """What is sampled."""

    prompts: int
    n: int
    new_tokens: int
    stops: int
    """stop tokens, of 256"""
    temperature: float = 1.0


CASES = {
    "stopping": Case(prompts=16, n=8, new_tokens=32, stops=20),
    "full": Case(prompts=16, n=8, new_tokens=32, stops=0),
    "one": Case(prompts=1, n=1, new_tokens=48, stops=0, temperature=0.0),
}
"""Outputs of random length, about 11 of 32 tokens; all of them at full length; one text, token by token."""
LENGTHS = (20, 60)
"""Tokens of a prompt, drawn evenly."""


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikegate bench generation", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)} (default: all)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument(
        "--peer", choices=PEERS, default="arcee", help="class of the same products, or Llama (default: arcee)"
    )
    ratios.add_arguments(parser, most_s=120.0, warm_up=1)
    ratios.add_clock_argument(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="also write the whole document there")
    add_json_argument(parser)
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line. Exit code 0, 2 for bad arguments, 130 when interrupted (what is there is
    printed)."""
    options = arguments_parser().parse_args(argv)
    try:
        for key, known in (("sizes", SIZES), ("cases", CASES)):
            if unknown := [name for name in getattr(options, key).split(",") if name not in known]:
                raise ValueError(f"--{key} {unknown[0]}: known are {', '.join(known)}")
        bench = Bench(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"bench generation: {error}", file=sys.stderr)
        return 2
    interrupted = False
    try:
        bench.measure()
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what was measured so far follows", file=sys.stderr)
    document = {**bench.document(), "interrupted": interrupted}
    bench.print_table()
    file = None if options.out is None else write_json(options.out, document)
    finish(
        document, "bench-generation", file=file, headline=("targets", "peer", "clock", "threads", "device", "interrupted")
    )
    return 130 if interrupted else 0


class Bench:
    """The measurement; `document()` is valid at any time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.until = options, ratios.until(options)
        device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        ratios.check_clock(options.clock, self.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.sizes, self.cases = options.sizes.split(","), options.cases.split(",")
        self.models = {name: model_of(name).to(self.device) for name in self.sizes}
        self.peers = {name: exported(model, options.peer) for name, model in self.models.items()}
        self.runs: dict[str, InTurn] = {}
        self.difference: dict[str, float] = {}
        self.flops: dict[str, dict[str, int]] = {}

    def measure(self) -> None:
        """Every size and case; raises ValueError where the two are not the same model."""
        for size in self.sizes:
            self.difference[size] = difference(self.models[size], self.peers[size])
            if not self.difference[size] < CLOSE:
                raise ValueError(f"{size}: logits differ by {self.difference[size]:.2g}: not the same model")
            for name in self.cases:
                case = CASES[name]
                prompts, stops = prompts_of(case), range(case.stops)
                cfg = GenerateConfig(new_tokens=case.new_tokens, n=case.n, temperature=case.temperature)
                sampler = Sampler(self.models[size], cfg, stops)
                probes = {
                    OURS: self._probe(lambda s=sampler, p=prompts: int(s.sample(p).lengths_R.sum())),  # type: ignore[misc]
                    THEIRS: self._probe(
                        lambda m=self.peers[size], p=prompts, c=case: sum(  # type: ignore[misc]
                            map(len, theirs(m, p, c.n, c.new_tokens, c.temperature, range(c.stops)))
                        )
                    ),
                }
                found = sampler.sample(prompts)
                key = f"{size}/{name}"
                self.flops[key] = {"ran": found.flops, "needed": found.needed_flops}
                self.runs[key] = InTurn(probes, OURS, self.until, torch.get_num_threads())
                self.runs[key].run(lambda text, key=key: ratios.say(f"{key}: {text}"))  # type: ignore[misc]

    def _probe(self, call: Callable[[], int]) -> Probe:
        """Seconds for each token that a call gives."""
        tokens = [0]

        def once() -> None:
            tokens[0] = call()

        timed = ratios.probe(once, self.device, self.options.clock)
        return lambda: timed() / tokens[0]

    def document(self) -> dict[str, Any]:
        """What was measured, as JSON types."""
        cells: dict[str, Any] = {}
        targets = []
        for key, run in self.runs.items():
            found = run.measured()
            if THEIRS not in found.ratios:
                continue
            ratio = found.ratios[THEIRS]
            tokens_per_s = {name: 1 / found.median_s(name) for name in (OURS, THEIRS)}
            cells[key] = {"tokens_per_s": tokens_per_s, "speed": ratio.to_dict(), "flops": self.flops[key]}
            met = None if ratio.median is None else ratio.median >= TARGET
            targets.append({"of": key, "what": "tokens/s over theirs", "value": ratio.median, "target": TARGET, "met": met})
        return {
            "targets": targets,
            "cells": cells,
            "logits_differ_by": self.difference,
            "peer": self.options.peer,
            "cases": {name: asdict(CASES[name]) for name in self.cases},
            "sizes": {name: SIZES[name] for name in self.sizes},
            "clock": self.options.clock,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor(),
            "versions": {**versions(), "transformers": _version()},
            "git": git_state(),
        }

    def print_table(self) -> None:
        """The ratios for people."""
        print(f"tokens a second, ours over {self.options.peer}'s; {self.options.clock} clock")
        print(f"  {'size/case':<20}{'ours':>12}{'theirs':>12}{ratios.HEADER}")
        for key, run in self.runs.items():
            found = run.measured()
            if THEIRS in found.ratios:
                speeds = "".join(f"{1 / found.median_s(name):>12.0f}" for name in (OURS, THEIRS))
                print(f"  {key:<20}{speeds}{ratios.columns(found.ratios[THEIRS])}")
        if self.runs:
            print(f"  {ratios.legend(found, self.options.clock)}")


def model_of(size: str) -> Transformer:
    """A model of that size with weights that do something: residual outputs are not zero, as they are at the start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(name=size, vocab_size=VOCAB, **SIZES[size]))  # type: ignore[arg-type]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("attn.o.weight", "mlp.fc2.weight")):
                    p.normal_(std=0.02)
    return model.eval()


def prompts_of(case: Case) -> list[np.ndarray]:
    """Random prompts, the same at every call."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, rng.integers(LENGTHS[0], LENGTHS[1] + 1)) for _ in range(case.prompts)]


@torch.no_grad()
def difference(model: Transformer, peer: Any) -> float:
    """Largest difference of logits on padded prompts, at their tokens."""
    prompts = prompts_of(CASES["stopping"])
    tokens, mask = padded(prompts, model.embed.weight.device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    found = peer(input_ids=tokens, attention_mask=mask, position_ids=position).logits
    worst = 0.0
    for row, prompt in enumerate(prompts):
        ours = model(tokens[row : row + 1, -len(prompt) :])[0]
        worst = max(worst, float((found[row, -len(prompt) :] - ours).abs().max()))
    return worst


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return None
