"""One of the two processes that `measured.py` starts: `python -m experiments.benches.scaling.rank FOLDER`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml

import configs
from experiments.benches.scaling.measured import summary
from hardware.meters.ratios import InTurn, Until, interval
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.records import Corpus
from sparse_update.data.stream import WindowStream
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.gates.config import GateConfig
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.records import TrainerConfig
from sparse_update.loop.trainer import Trainer
from sparse_update.nested import pack
from sparse_update.parallel.make import make_mesh
from sparse_update.parallel.ranks import Ranks
from sparse_update.parallel.settings import MeshConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.optimizer import storage_bytes
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig

CPU = torch.device("cpu")
GATE = {"unit": "sequence", "signal": "ngram", "keep_fraction": 0.7, "noise_cut": 0.2, "pool_windows": 64}
BLOCKS = {"kind": "blocks", "active_fraction": 0.125, "embedding_strips": True}
"""Of the matrices' rows, and of embedding and head's width, that a turn updates; gains move always."""
TENTH = {**BLOCKS, "active_fraction": 0.1, "block_rows": 8}
"""A tenth: with n processes and a share a of the weights active, Muon needs (1 + 2a) / (3n) of the bytes of one process
that updates everything, AdamW (1 + 3a) / (4n); 0.20 on two processes is a tenth with Muon."""
TEXT_TOKENS = 2_000_000


def corpus() -> Corpus:
    generator = np.random.default_rng(0)
    steps = generator.choice([1, 1, 2, 5, 11], TEXT_TOKENS)
    tokens = (97 + np.cumsum(steps) % 26).astype(np.uint16)
    offsets, held = np.array([0, len(tokens)], dtype=np.int64), tokens[:4096]
    few = np.array([0, len(held)], dtype=np.int64)
    size = len(tokens)
    return Corpus(
        "made up", tokens, offsets, ("made up",), held, few, ("made up",), 256, size, len(held), "0" * 64, ByteTokenizer()
    )


def trainer(
    asked: dict[str, Any],
    mesh: str,
    gate: dict[str, Any],
    subset: dict[str, Any],
    text: Corpus,
    place: Path = Path("unused"),
) -> Trainer:
    sizes = yaml.safe_load((Path(configs.__file__).parent / "model" / f"{asked['size']}.yaml").read_text())
    cfg, optim = ModelConfig(**{**sizes, "vocab_size": 256}), OptimConfig(name=asked["optim"])
    table = shipped_table()
    times = table.times(cfg, optim, asked["windows"], CPU, "fp32", False)
    cfg.attention = times.attention
    torch.manual_seed(0)
    return make_trainer(
        Transformer(cfg),
        Arm(GateConfig(**gate), SubsetConfig(**subset), optim),
        TrainerConfig(budget_offered_tokens=10**12, batch_windows=asked["windows"]),
        Text(WindowStream(text, cfg.context, 0), {"val": torch.zeros(1, cfg.context + 1, dtype=torch.int64)}),
        Prices(times, lambda t, steps, components: table.extended(t, cfg, optim, steps, components)),
        Place(place),
        0,
        mesh=make_mesh(MeshConfig(kind=mesh), CPU),
    )


def advance(made: Trainer, steps: int) -> int:
    """Take so many steps as the loop does, and return the tokens that were trained on."""
    before = made.updates.tally.tokens
    for _ in range(steps):
        progress = made.budget.progress
        batch = made.gate.next(made.budget.windows_at(progress), progress)
        step = made.budget.step(progress)
        found = made.updates.take(batch, step, progress)
        made.gate.observe(batch, found, progress, made.budget.over_plain(step, progress))
        made.budget.settle()
        made.updates.turn(made.budget.progress)
    return made.updates.tally.tokens - before


def speed(asked: dict[str, Any], text: Corpus) -> tuple[dict[str, Any], float]:
    """Speed-ups, and the share of a gated step that the gate's collectives take."""
    first = dist.get_rank() == 0
    arms: dict[str, Trainer] = {}
    for gate, settings in (("off", {}), ("on", GATE)):
        if first:
            arms[f"single {gate}"] = trainer(asked, "single", settings, {}, text)
        arms[f"ddp {gate}"] = trainer(asked, "ddp", settings, {}, text)
    names = ["single off", "ddp off", "single on", "ddp on"]
    seconds: dict[str, list[float]] = defaultdict(list)
    tokens: dict[str, list[int]] = defaultdict(list)
    for number in range(-1, asked["rounds"]):  # the first round warms up
        for name in names if number % 2 else reversed(names):
            dist.barrier()
            start = time.perf_counter()
            done = advance(arms[name], asked["steps"]) if name in arms else 0
            dist.barrier()  # one process alone, or both: the slower one counts
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(done or asked["steps"] * asked["windows"])
    return summary(seconds, tokens), _gate_share(arms["ddp on"], statistics.median(seconds["ddp on"]) / asked["steps"])


def _gate_share(made: Trainer, step_s: float) -> float:
    """What a gated step gathers for its gate, timed apart, over the step."""
    mesh = made.mesh
    assert isinstance(mesh, Ranks)
    shapes: list[torch.Size] = []
    gather = mesh.gather

    def noted(part: torch.Tensor) -> torch.Tensor:
        shapes.append(part.shape)
        return gather(part)

    mesh.gather = noted  # type: ignore[method-assign]
    steps = 4
    advance(made, steps)
    mesh.gather = gather  # type: ignore[method-assign]
    total = 0.0
    for shape in shapes:
        part, times = torch.zeros(shape), []
        for _ in range(20):
            dist.barrier()
            start = time.perf_counter()
            mesh.gather(part)
            times.append(time.perf_counter() - start)
        total += statistics.median(times)
    return total / steps / step_s


def held(made: Trainer) -> dict[str, int]:
    """Bytes of two steps on this process: weights, and the most that gradients and optimizer state took together."""
    advance(made, 2)
    local = (p.to_local() if hasattr(p, "to_local") else p for p in made.updates.model.parameters())
    blocks = [sum(p.nbytes for p in block.parameters()) for block in made.updates.model.blocks]
    weights = storage_bytes(local)
    return {"weights": weights, "updates": made.updates.tally.peak_both, "largest_block": max(blocks)}


def memory(asked: dict[str, Any], text: Corpus) -> dict[str, Any]:
    found: dict[str, Any] = {}
    asked = {**asked, "windows": 4}
    alone = held(trainer(asked, "single", {}, {}, text))
    whole = alone["weights"] + alone["updates"]
    arms: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("fsdp", "fsdp", {}),
        ("fsdp_blocks", "fsdp", BLOCKS),
        ("fsdp_tenth", "fsdp", TENTH),
        ("tp", "tp", {}),
    )
    for name, mesh, subset in arms:
        made = trainer(asked, mesh, {}, subset, text)
        mine = held(made)
        most = made.mesh.largest(mine["weights"] + mine["updates"])
        gathered = made.mesh.largest(mine["largest_block"]) if mesh == "fsdp" else 0
        found[name] = {
            "bytes_ratio": most / whole,
            "bytes": int(most),
            "single_bytes": whole,
            "with_a_gathered_block_ratio": (most + gathered) / whole,
        }
        if subset:
            found[name]["active_fraction"] = made.updates.subset.active.fraction(made.updates.model)
    return found


def resuming(asked: dict[str, Any], text: Corpus, place: Path) -> dict[str, Any]:
    """Seconds to take up a checkpoint that two processes wrote in parts, over those that torch's own `dcp.load` takes for
    the same tensors; every file's sha256 is checked by ours alone. And what training waits for where parts are written
    beside it, over where it stands still."""
    made = trainer({**asked, "windows": 4}, "fsdp", {}, {}, text, place)
    advance(made, 2)
    kept = made.checkpoints.save()
    state, _ = pack(made.checkpoints.state_dict())
    parts = {"model": dict(made.updates.model.state_dict()), "state": state}
    empty = {part: {name: torch.zeros_like(t) for name, t in tensors.items()} for part, tensors in parts.items()}

    def by_torch() -> None:
        for part, tensors in empty.items():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(kept / part)))

    loads = in_turn({"ours": lambda: made.resume(kept), "torch": by_torch}, "torch", asked)
    for part, tensors in parts.items():
        for name, t in tensors.items():
            if not torch.equal(_here(t), _here(empty[part][name])):
                raise RuntimeError(f"torch's load and the checkpoint differ in {part}: {name}")
    keeper = made.checkpoints.keeper

    def save(beside: bool) -> None:
        keeper.beside = beside
        keeper.save(made.checkpoints._parts)

    # what runs on beside is waited for between two measurements, outside of both
    stalls = in_turn({"beside": lambda: save(True), "still": lambda: save(False)}, "still", asked, keeper.close)
    keeper.close()
    size = sum(path.stat().st_size for path in kept.rglob("*.safetensors"))
    return {**loads, "bytes": size, "stall": stalls}


def in_turn(
    ways: dict[str, Callable[[], None]], base: str, asked: dict[str, Any], after: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The first way's seconds over those of the base, by processor time of both processes together and by the wall.

    Both ways find the files in the page cache, since they read or write the same ones in turn and the first rounds are
    thrown away; both are timed between the same two barriers. Rounds go on until the interval of the ratio of processor
    time is narrower than 5 % of it, `asked["load_s"]` seconds at most; else the verdict is "too noisy".
    """
    walls: dict[str, list[float]] = {name: [] for name in ways}

    def probe(name: str) -> float:
        dist.barrier()
        begun, used = time.perf_counter(), time.process_time()
        ways[name]()
        used = time.process_time() - used
        dist.barrier()  # the slower process counts
        wall = time.perf_counter() - begun
        after()
        held = torch.tensor([used, 0.0, wall], dtype=torch.float64)
        dist.all_reduce(held[:1])
        dist.all_reduce(held[2:], dist.ReduceOp.MAX)
        walls[name].append(float(held[2]))
        return float(held[0])

    def now() -> float:
        """The same on both processes, so that both stop in the same round."""
        held = torch.tensor([time.perf_counter()], dtype=torch.float64)
        dist.broadcast(held, 0)
        return float(held)

    until = Until(most_s=asked["load_s"], most_rounds=asked["load_rounds"], seed=1)
    found = InTurn({name: partial(probe, name) for name in ways}, base, until, threads=1, now=now).run()
    (arm,) = found.ratios
    ratio = found.ratios[arm]
    pairs = zip(walls[arm][until.warm_up :], walls[base][until.warm_up :], strict=True)
    by_wall = sorted(one / other for one, other in pairs)
    ends = interval(by_wall)
    return {
        **ratio.to_dict(),
        "ratio": ratio.typical,
        "wall": {"ratio": statistics.median(by_wall), "low": ends and ends[0], "high": ends and ends[1]},
        "cpu_s": {name: found.median_s(name) for name in ways},
        "wall_s": {name: statistics.median(values[until.warm_up :]) for name, values in walls.items()},
    }


def _here(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def main(place: Path) -> None:
    asked = json.loads((place / "asked.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    text = corpus()
    if asked["only_resume"]:
        resumed = resuming(asked, text, place / "run")
        if dist.get_rank() == 0:
            (place / "found.json").write_text(json.dumps({"resume": resumed}))
        dist.barrier()
        dist.destroy_process_group()
        return
    bytes_of = memory(asked, text)
    resumed = resuming(asked, text, place / "run")
    speeds, share = speed(asked, text)
    if dist.get_rank() == 0:
        for name in ("blocks", "tenth"):
            bytes_of["fsdp"][name] = bytes_of.pop(f"fsdp_{name}")
        (place / "found.json").write_text(json.dumps({"ddp": speeds, **bytes_of, "gate_share": share, "resume": resumed}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
