"""`python -m experiments.studies.spiking_lm`: a language model on the chip, beside a Transformer of equal size.

Both see the same windows in the same order (Shakespeare's plays as bytes, held-out plays for the loss) and the same
number of tokens, under AdamW with the same schedule. The last share of the spiking model's steps is trained on the chip's
grid; then all its blocks become one integer graph, which runs on the simulator over held-out text. A few samples run in
Lava, compared value by value. Losses are nats per byte; intervals are 95 % over seeds where there are several, and over
held-out windows of one model otherwise (the same windows for both, so that differences are paired).

Arms: transformer; graded (gated state-space mixer, graded messages, Loihi 2); lif (binary spikes of leaky neurons).
Each arm and seed is a folder below --out with a checkpoint; the same command goes on where it was interrupted, and trains
nothing twice. The last line is JSON. Exit codes: 0 done and the simulated model equals the one on the grid; 1 it does
not, or Lava differs; 2 the command is wrong or a package is missing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.comparison.statistics import Interval, interval
from experiments.runs.folder import read_json
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import plain, write_json
from experiments.runs.progress import Bar, counted
from hardware.placement import DoesNotFit, place
from neuro.graph import save_graph
from neuro.graph.demand import layer_demands
from neuro.language.conversion import DeployedLanguageModel, StreamNetwork, convert_language
from neuro.language.grid import range_penalty
from neuro.language.model import LanguageConfig, SpikingLanguageModel
from neuro.simulators import snntorch_backend
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava import client as lava_client
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.regimes import make_stream
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sparse_update.transformer import ModelConfig, Transformer, token_loss
from sparse_update.weights.settings import OptimConfig, schedule

ARMS = ("transformer", "graded", "lif")
SAVE_EVERY_S = 30.0
EVAL_BATCH = 64


def text(args: argparse.Namespace) -> DataConfig:
    """The demo's plays, or the files of `--text`."""
    return DataConfig() if args.text is None else DataConfig(name="files", path=str(args.text))


def build(arm: str, args: argparse.Namespace, vocab_size: int) -> nn.Module:
    """The untrained model of an arm, of about the same size in all arms."""
    if arm == "transformer":
        return Transformer(
            ModelConfig(
                vocab_size=vocab_size,
                width=args.width,
                layers=args.layers,
                heads=args.heads,
                context=args.context,
                attention="explicit",
            )
        )
    return SpikingLanguageModel(
        LanguageConfig(vocab_size, args.width, args.layers, neurons=arm, event_threshold=args.event_threshold)
    )


def train(arm: str, seed: int, args: argparse.Namespace, corpus: Corpus, folder: Path) -> nn.Module:
    """Train an arm for `args.tokens`, or go on from its checkpoint; the result stands in `folder`.

    Raises ValueError for a checkpoint that was made with other settings.
    """
    settings = {"arm": arm, "seed": seed, "tokens": args.tokens, "batch": args.batch, "lr": args.lr}
    settings |= {"width": args.width, "layers": args.layers, "heads": args.heads, "context": args.context}
    settings |= {"event_threshold": args.event_threshold, "grid_share": args.grid_share, "corpus": corpus.sha256}
    torch.manual_seed(seed)
    model = build(arm, args, corpus.vocab_size)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    stream = make_stream(corpus, text(args), args.context, seed)
    shape = OptimConfig()
    steps, done, wall_s = max(1, args.tokens // (args.batch * args.context)), 0, 0.0
    on_grid_from = steps if arm == "transformer" else round(steps * (1 - args.grid_share))
    if (folder / "checkpoint").exists():
        saved = load_checkpoint(folder / "checkpoint")
        if saved.meta["settings"] != plain(settings):
            raise ValueError(f"{folder} was made with other settings; choose another --out, or give those again")
        model.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.state["optimizer"])
        stream.load_state_dict(saved.state["stream"])
        done, wall_s = int(saved.meta["step"]), float(saved.meta["wall_s"])

    def save() -> None:
        state = {"optimizer": optimizer.state_dict(), "stream": stream.state_dict()}
        meta = {"settings": plain(settings), "step": step, "wall_s": wall_s + time.perf_counter() - begin}
        save_checkpoint(folder / "checkpoint", model.state_dict(), state, meta)

    begin = last = time.perf_counter()
    step = done
    with Bar(f"{arm} seed {seed}", steps, "steps", not args.quiet) as bar:
        while step < steps:
            if isinstance(model, SpikingLanguageModel):
                model.on_chip_grid(step >= on_grid_from)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule((step + 1) / steps, shape)
            tokens = stream.take(args.batch).tokens
            loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean()
            optimizer.zero_grad(set_to_none=True)
            (loss + range_penalty(model)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.to(step, f"loss {loss.item():.3f}")
            if time.perf_counter() - last > SAVE_EVERY_S or step == steps:
                save()
                last = time.perf_counter()
    if isinstance(model, SpikingLanguageModel):
        model.on_chip_grid(True)
    return model.eval()


@torch.no_grad()
def window_losses(model: nn.Module, windows_NT1: Tensor, desc: str = "", quiet: bool = True) -> Tensor:
    """Mean loss in nats of each held-out window, float64 (N,)."""
    batches = windows_NT1.split(EVAL_BATCH)
    parts = counted(batches, desc, len(batches), "batches", not quiet)
    return torch.cat([token_loss(model(part[:, :-1]), part[:, 1:]).double().mean(dim=1) for part in parts])


def deploy(
    model: SpikingLanguageModel, windows_NT1: Tensor, args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], Tensor]:
    """What the chip's integers make of the model: losses, operations, cores; and the simulated loss of each window."""
    model = model.double()  # sums of integers are then exact
    model.on_chip_grid(False)
    floats = window_losses(model, windows_NT1, "float", args.quiet)
    model.on_chip_grid(True)
    grid = window_losses(model, windows_NT1, "grid", args.quiet)
    network = convert_language(model)
    save_graph(network.graph, folder / "model.graph.npz")
    deployed = DeployedLanguageModel(model, network)
    simulated = window_losses(deployed, windows_NT1, "simulator", args.quiet)
    macs = model.macs_per_token()
    counts = deployed.counts()
    found: dict[str, Any] = {
        "loss_float_nats": float(floats.mean()),
        "loss_grid_nats": float(grid.mean()),
        "loss_simulated_nats": float(simulated.mean()),
        "equals_grid": bool(torch.equal(grid, simulated)),
        "simulated_minus_float": _paired(simulated, floats),
        "synops_per_token": deployed.synops_per_token,
        "macs_per_token": macs,
        "synops_fraction": deployed.synops_per_token / macs["chip"],
        "mapped_mac_share": macs["chip"] / (macs["chip"] + macs["host"]),
        "latency_steps": network.depth,
        "health": deployed.health,
        "layers": [
            {"layer": c.layer, "synops_per_token": c.synops / c.tokens, "macs_per_token": c.dense_macs / c.tokens}
            for c in counts
            if not c.host
        ],
        "chip": _cores(network),
        "neurons": sum(p.size for p in network.graph.populations if p.kind != "input"),
    }
    found["lava"] = against_lava(model, network, windows_NT1[: args.lava_samples, : args.lava_tokens], args.timeout)
    return found, simulated


def _cores(network: StreamNetwork) -> dict[str, Any]:
    """Cores of one Loihi 2 with and without layers sharing a core."""
    found: dict[str, Any] = {}
    for key, share in (("apart", False), ("shared", True)):
        try:
            placed = place(layer_demands(network.graph), "loihi2", share=share)
            found[key] = {"cores": len(placed.cores), "chips": placed.chips}
        except DoesNotFit as failure:
            found[key] = {"does_not_fit": str(failure)}
    return found


def against_lava(
    model: SpikingLanguageModel, network: StreamNetwork, tokens_BT: Tensor, timeout_s: float
) -> dict[str, Any]:
    """Samples through Lava and through our simulator: every message of every population at every step compared."""
    if not len(tokens_BT):
        return {"ran": False, "reason": "not asked for"}
    inputs = network.inputs(model.stream(tokens_BT))
    try:
        theirs = lava_client.run(network.graph, inputs, record=("spikes",), timeout_s=timeout_s)
    except lava_client.LavaUnavailable as error:
        return {"ran": False, "reason": str(error)}
    except lava_client.LavaError as error:
        return {"ran": True, "equal": False, "reason": str(error)}
    result = lava_client.compare(theirs, simulate(network.graph, inputs, record=("spikes",)))
    return {"ran": True, "equal": result.equal, "values": result.values, "text": str(result)}


def _paired(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Mean difference per token and its 95 % interval over windows."""
    return asdict(interval((first - second).tolist()))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All arms and seeds; the content of the last line."""
    corpus = load_corpus(text(args))
    windows = val_windows(corpus, args.context, args.eval_tokens)
    arms: dict[str, dict[str, Any]] = {}
    losses: dict[tuple[str, int], Tensor] = {}
    for seed in args.seeds:
        for arm in args.arms:
            folder = args.out / f"{arm}-s{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            model = train(arm, seed, args, corpus, folder)
            print(f"{arm}, seed {seed}: trained, evaluating on {windows[:, 1:].numel():,} held-out tokens", file=sys.stderr)
            if isinstance(model, SpikingLanguageModel):
                found, losses[arm, seed] = deploy(model, windows, args, folder)
            else:
                losses[arm, seed] = window_losses(model, windows, "float", args.quiet)
                found = {"loss_float_nats": float(losses[arm, seed].mean())}
            found["params"] = sum(p.numel() for p in model.parameters())
            found["train_s"] = load_checkpoint(folder / "checkpoint").meta["wall_s"]
            if ("transformer", seed) in losses and arm != "transformer":
                found["minus_transformer"] = _paired(losses[arm, seed], losses["transformer", seed])
            write_json(folder / "result.json", found)
            arms.setdefault(arm, {})[str(seed)] = read_json(folder / "result.json")
    return {
        "arms": arms,
        "mean": {arm: _over_seeds(seeds) for arm, seeds in arms.items()},
        "tokens": args.tokens,
        "held_out_tokens": windows[:, 1:].numel(),
        "context": args.context,
        "seeds": args.seeds,
    }


def _over_seeds(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("loss_float_nats", "loss_simulated_nats", "synops_per_token", "synops_fraction"):
        values = [result[key] for result in seeds.values() if key in result]
        if values:
            found[key] = asdict(interval(values))
    return found


def table(document: dict[str, Any]) -> str:
    """The results, a line per arm and seed."""
    lines = [
        f"{'arm':<12} {'seed':>4} {'params':>9} {'float':>8} {'chip':>8} {'chip - transformer':>26} {'synops/token':>13}"
        f" {'of MACs':>8} {'mapped':>7} {'cores':>6}"
    ]
    for arm, seeds in document["arms"].items():
        for seed, found in seeds.items():
            line = f"{arm:<12} {seed:>4} {found['params']:>9,} {found['loss_float_nats']:>8.4f}"
            if "loss_simulated_nats" in found:
                behind = Interval(**found["minus_transformer"]).text() if "minus_transformer" in found else "-"
                cores = found["chip"]["apart"].get("cores", "-")
                line += (
                    f" {found['loss_simulated_nats']:>8.4f} {behind:>26} {found['synops_per_token']:>13,.0f}"
                    f" {found['synops_fraction']:>8.1%} {found['mapped_mac_share']:>7.1%} {cores:>6}"
                )
            lines.append(line)
            if found.get("lava", {}).get("ran"):
                lines.append(f"{'':<12} Lava: {found['lava'].get('text', found['lava'].get('reason'))}")
    return "\n".join(lines)


def holds(document: dict[str, Any]) -> bool:
    """Whether every simulated model equals the one on the grid, and Lava where it ran."""
    chips = [found for seeds in document["arms"].values() for found in seeds.values() if "lava" in found]
    finite = all(
        math.isfinite(float(found["loss_float_nats"])) for seeds in document["arms"].values() for found in seeds.values()
    )
    return finite and all(f["equals_grid"] and f["lava"].get("equal", True) for f in chips)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(prog="spikegate study spiking_lm", description="a language model on the chip")
    out.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what to train (default: all)")
    out.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and order (default: 0)")
    out.add_argument("--tokens", type=float, default=1e6, help="to train on, each arm (default: 1e6)")
    out.add_argument("--batch", type=int, default=8, help="windows of a step (default: 8)")
    out.add_argument("--context", type=int, default=128, help="tokens of a window (default: 128)")
    out.add_argument("--lr", type=float, default=4e-3, help="peak learning rate, all arms (default: 4e-3)")
    out.add_argument("--width", type=int, default=64, help="of the residual stream (default: 64)")
    out.add_argument("--layers", type=int, default=3, help="blocks (default: 3)")
    out.add_argument("--heads", type=int, default=4, help="of the Transformer's attention (default: 4)")
    out.add_argument("--event-threshold", type=float, default=0.0, help="inputs of dense layers below it send nothing")
    out.add_argument("--grid-share", type=float, default=0.25, help="of the steps, at the end, on the grid (default: 0.25)")
    out.add_argument("--eval-tokens", type=int, default=32768, help="held out, all arms (default: 32768)")
    out.add_argument("--lava-samples", type=int, default=1, help="held-out windows through Lava, 0: none (default: 1)")
    out.add_argument("--lava-tokens", type=int, default=32, help="of each of them (default: 32)")
    out.add_argument("--timeout", type=float, default=180.0, help="seconds that Lava may take (default: 180)")
    out.add_argument("--text", type=Path, default=None, help="a file or folder in place of the plays")
    out.add_argument("--out", type=Path, default=Path("runs/spiking_lm"), help="folder of the runs")
    out.add_argument("--quiet", action="store_true", help="no progress bars")
    add_json_argument(out)
    return out


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    own = parser()
    args = own.parse_args(argv)
    args.tokens = int(args.tokens)
    for key, low in (
        ("tokens", 1),
        ("batch", 1),
        ("context", 2),
        ("width", 1),
        ("layers", 1),
        ("eval_tokens", args.context),
    ):
        if getattr(args, key) < low:
            own.error(f"--{key.replace('_', '-')} is {getattr(args, key)}; the lowest is {low}")
    if not 0 < args.grid_share <= 1:
        own.error(f"--grid-share is {args.grid_share}; it is a share, above 0 and up to 1")
    try:
        document = run(args)
    except (snntorch_backend.SnnTorchUnavailable, CorpusError, CheckpointError, ValueError) as error:
        print(f"spiking_lm: {error}", file=sys.stderr)
        return 2
    document["holds"] = holds(document)
    print(table(document))
    finish(document, "spiking_lm", file=write_json(args.out / "result.json", document))
    return 0 if document["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
