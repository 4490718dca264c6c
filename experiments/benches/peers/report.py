"""`python -m experiments.bench simulator --peers`: our simulator, called without options, beside float simulators and Lava.

Every simulator runs the same network in a process of its own, in turn, never two at once, on the same number of threads;
how each of them runs is said in `experiments/benches/peers/float_peers.py`. Weights are the same; thresholds are found so
that every layer fires alike. Ratios are a peer's time over ours, so above 1 ours is faster, with the median's interval; a
target is met or missed where its whole interval is on one side, and "too noisy" where it is not. Where a peer has two
neurons, one with our synaptic current and one without (`_lif`), the faster one is held against the target.

"products" are the float32 products of all layers and nothing else, "exact" the integer products that ours took. Their
ratios are shares: 0.5 is half of the speed of the products.

The clock is the wall's. `--threads 1 --clock cpu` takes the seconds of each process alone, for a machine that others use;
of Lava, which is many processes, those of all of them, which may work at the same time on an idle machine.

The environment of the peers is `.venv-readers` (`make readers`), or what SPIKEGATE_READERS_PYTHON names.

The last line is JSON: "ratios" {case: {peer: median}}, "targets" [{"case", "peer", "at_least", "ratio", "low", "high",
"best", "verdict"}], and "cases" with all of it: firing, microseconds per step and sample, versions, the machine.
Exit codes: 0 measured, whatever the numbers; 1 an environment is missing or a peer failed; 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.benches import ratios
from experiments.benches.peers import cases
from experiments.benches.peers.cases import Case
from experiments.runs.output import add_json_argument, entry, finish
from hardware.interpreters import find_interpreter
from hardware.meters.elsewhere import Elsewhere, ElsewhereError
from hardware.meters.ratios import InTurn, Measured, Ratio
from neuro.simulators.lava.client import LavaError, find_python

FLOAT = ("spikingjelly", "spikingjelly_lif", "snntorch", "norse", "products")
VARIANTS = {"spikingjelly": ("spikingjelly", "spikingjelly_lif")}
"""Peer of a target -> the arms of which the fastest is held against it."""
LEAST_S = 0.1
"""Seconds of runs behind one measurement, at least."""
LAVA_STEPS = {"pilotnet": 2}
"""Steps of one run of Lava."""
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Row:
    """A case, its arms beside ours, and how many times slower than ours each named peer should at least be."""

    case: Case
    arms: tuple[str, ...]
    targets: Mapping[str, float]


ROWS = (
    Row(cases.dense("n256_b256", 256, 256, 64), (*FLOAT, "exact"), {"spikingjelly": 4.0}),
    Row(cases.dense("n1024_b64", 1024, 64, 64), (*FLOAT, "exact"), {"spikingjelly": 3.0}),
    Row(cases.dense("n256_b1", 256, 1, 2000), (*FLOAT, "exact"), {"spikingjelly": 10.0}),
    Row(cases.dense("n1024_b1", 1024, 1, 1000), (*FLOAT, "exact"), {"spikingjelly": 10.0}),
    Row(cases.pilotnet(4, 64), (*FLOAT, "lava"), {"spikingjelly": 1.5, "lava": 100.0}),
)
RARE, OFTEN = 0.02, 0.35
FIRING = (
    (cases.dense("n1024_b64_rare", 1024, 64, 64, RARE, RARE), cases.dense("n1024_b64_often", 1024, 64, 64, OFTEN, OFTEN)),
    (cases.dense("n1024_b1_rare", 1024, 1, 1000, RARE, RARE), cases.dense("n1024_b1_often", 1024, 1, 1000, OFTEN, OFTEN)),
)
FIRING_TARGETS = {"n1024_b64": 4.0}
"""Of a case's seconds with frequent spikes, input included, over those with rare ones."""
PRODUCT_TARGETS = {"n256_b256": 0.5, "n1024_b64": 0.5}
"""Least share of the exact products' speed."""
NAMES = (*(row.case.name for row in ROWS), "firing")


class Missing(RuntimeError):
    """No environment with the peers."""


def peers_python() -> Path:
    """The interpreter that has SpikingJelly, snnTorch and norse.

    Raises:
        Missing: there is none; says where it was looked for and the remedy.
    """
    remedy = (
        "run `make readers`, or set SPIKEGATE_READERS_PYTHON to an interpreter that has SpikingJelly, snnTorch and norse"
    )
    return find_interpreter("SPIKEGATE_READERS_PYTHON", ".venv-readers", "peers", remedy, Missing)


def worker(arm: str, name: str, request: Mapping[str, Any], folder: Path) -> Elsewhere:
    """The process of an arm, started; its facts will lie in `folder`/`name`.facts.json.

    Raises:
        Missing, LavaError: no environment for it.
    """
    path = folder / f"{name}.request.json"
    path.write_text(json.dumps({**request, "peer": arm, "facts": str(folder / f"{name}.facts.json")}), encoding="utf-8")
    threads = str(request["threads"])
    env = {"OMP_NUM_THREADS": threads, "PYTHONNOUSERSITE": "1"}
    if arm == "lava":
        script = ROOT / "neuro" / "lava_worker" / "timed.py"
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return Elsewhere(name, [str(find_python()), str(script), str(path)], env)
    if arm in ("ours", "exact"):
        command = [sys.executable, "-m", "experiments.benches.peers.ours", str(path)]
        return Elsewhere(
            name,
            command,
            env | {"PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])},
        )
    return Elsewhere(name, [str(peers_python()), str(Path(__file__).with_name("float_peers.py")), str(path)], env)


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What every request says of how it is timed."""
    return {"threads": args.threads, "least_s": LEAST_S, "clock": args.clock}


def in_turn(arms: Mapping[str, Elsewhere], scale: Mapping[str, float], base: str, args: argparse.Namespace) -> Measured:
    """Seconds times `scale` of each arm, in turn."""

    def probe(name: str) -> float:
        return arms[name]() * scale.get(name, 1.0)

    probes = {name: (lambda name=name: probe(name)) for name in arms}
    return InTurn(probes, base, ratios.until(args), threads=args.threads).run(lambda text: None)


def row_measured(row: Row, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One case beside its peers."""
    case = row.case
    ratios.say(f"{case.name}: thresholds, then {', '.join(row.arms)}")
    request, _ = cases.write(case, folder)
    request |= asked(args) | {"steps": LAVA_STEPS.get(case.name, 100)}
    with ExitStack() as stack:
        names = {arm: f"{case.name}.{arm}" for arm in ("ours", *row.arms)}
        arms = {arm: stack.enter_context(worker(arm, name, request, folder)) for arm, name in names.items()}
        # Lava runs one sample through a few steps
        scale = {"lava": case.batch * case.steps / request["steps"]}
        found = in_turn(arms, scale, "ours", args)
    facts = {arm: json.loads((folder / f"{case.name}.{arm}.facts.json").read_text(encoding="utf-8")) for arm in arms}
    return document_of(case, found, facts)


def firing_measured(pair: tuple[Case, Case], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours with rare spikes and with frequent ones: the second over the first."""
    ratios.say(f"{pair[0].name}, {pair[1].name}: thresholds, then ours")
    with ExitStack() as stack:
        arms = {}
        for case in pair:
            request, _ = cases.write(case, folder)
            request |= asked(args)
            arms[case.name] = stack.enter_context(worker("ours", case.name, request, folder))
        found = in_turn(arms, {}, pair[0].name, args)
    facts = {case.name: json.loads((folder / f"{case.name}.facts.json").read_text(encoding="utf-8")) for case in pair}
    return document_of(pair[0], found, facts)


def document_of(case: Case, found: Measured, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What one measurement leaves, in JSON types."""
    each = case.batch * case.steps / 1e6
    return {
        "ratios": {name: ratio.to_dict() for name, ratio in found.ratios.items()},
        "us_per_step_and_sample": {name: found.median_s(name) / each for name in found.seconds},
        "best_us_per_step_and_sample": {name: min(found.seconds[name]) / each for name in found.seconds},
        "firing": {name: fact["firing"] for name, fact in facts.items() if "firing" in fact},
        "first_s": {name: fact["first_s"] for name, fact in facts.items()},
        "versions": {name: version for fact in facts.values() for name, version in fact["versions"].items()},
        "machine": str(found.machine),
        "legend": ratios.legend(found),
        "batch": case.batch,
        "steps": case.steps,
    }


def judged(ratio: Mapping[str, Any], at_least: float) -> str:
    """ "met" or "missed" where the interval lies on one side of the target, else "too noisy"."""
    low, high = ratio["low"], ratio["high"]
    if low is None or high is None:
        return "too noisy"
    if low >= at_least:
        return "met"
    return "missed" if high < at_least else "too noisy"


def fastest(found: Mapping[str, Mapping[str, Any]], peer: str) -> str:
    """Of a peer's variants the one that came nearest to ours; "" if it was left out."""
    names = [name for name in VARIANTS.get(peer, (peer,)) if name in found]
    return min(names, key=lambda name: found[name]["low"] or found[name]["best"], default="")


def targets(documents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every target whose case was measured, with its ratio and its verdict."""
    made = []
    wanted: list[tuple[str, str, float]] = [
        (row.case.name, peer, least) for row in ROWS for peer, least in row.targets.items()
    ]
    wanted += [(name, "exact", least) for name, least in PRODUCT_TARGETS.items()]
    wanted += [(f"{name}_rare", f"{name}_often", least) for name, least in FIRING_TARGETS.items()]
    for case, peer, least in wanted:
        if case not in documents:
            continue
        found = documents[case]["ratios"]
        if not (arm := fastest(found, peer)):
            continue
        ratio = found[arm]
        made.append(
            {
                "case": case,
                "peer": arm,
                "at_least": least,
                "ratio": ratio["median"],
                "low": ratio["low"],
                "high": ratio["high"],
            }
            | {"best": ratio["best"], "verdict": judged(ratio, least)}
        )
    return made


def print_case(name: str, found: Mapping[str, Any]) -> None:
    """One measurement for people."""
    print(f"\n{name}: batch {found['batch']}, {found['steps']} steps")
    print(f"{'':>18}{'us/step/sample':>16}{ratios.HEADER}   firing")
    for arm, us in found["us_per_step_and_sample"].items():
        rates = found["firing"].get(arm, [])
        shown = f"{min(rates):.3f} .. {max(rates):.3f}" if rates else ""
        ratio = found["ratios"].get(arm)
        middle = ratios.columns(as_ratio(ratio)) if ratio else " " * len(ratios.HEADER)
        print(f"{arm:>18}{us:>16.2f}{middle}   {shown}")
    print(found["legend"])


def as_ratio(found: Mapping[str, Any]) -> Ratio:
    """A ratio out of its document."""
    settled = found["median"] is not None
    typical = found["median"] if settled else found["best"]
    return Ratio("", "", typical, found["best"], found["low"], found["high"], found["rounds"], settled)


def print_targets(found: Iterable[Mapping[str, Any]]) -> None:
    print()
    for each in found:
        ratio = "too noisy" if each["ratio"] is None else f"{each['ratio']:.2f}"
        print(f"{each['case']}: {each['peer']} {ratio}, at least {each['at_least']:g} wanted: {each['verdict']}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="spikegate bench simulator --peers", description="our simulator beside float simulators and Lava, in turn"
    )
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every simulator (default: torch's)")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of each process; one thread only")
    made.add_argument("--cases", nargs="+", choices=NAMES, default=list(NAMES), help="which (default: all)")
    made.add_argument("--without", nargs="+", default=[], metavar="PEER", help="peers that are left out")
    ratios.add_arguments(made, most_s=120.0, warm_up=1)
    add_json_argument(made)
    return made


@entry
def main(argv: Sequence[str]) -> int:
    """Entry point; see the module for exit codes."""
    args = parser().parse_args(argv)
    known = sorted({arm for row in ROWS for arm in row.arms})
    wrong = ""
    if args.threads < 1:
        wrong = f"--threads {args.threads}: at least 1"
    elif args.clock == "cpu" and args.threads > 1:
        wrong = f"--clock cpu with --threads {args.threads}: threads that wait count as working; one thread is needed"
    elif unknown := set(args.without).difference(known):
        wrong = f"--without {' '.join(sorted(unknown))}: there is {', '.join(known)}"
    if wrong:
        print(f"bench simulator --peers: {wrong}", file=sys.stderr)
        return 2
    documents: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for row in ROWS:
                if row.case.name in args.cases:
                    arms = tuple(arm for arm in row.arms if arm not in args.without)
                    documents[row.case.name] = row_measured(Row(row.case, arms, row.targets), args, folder)
                    print_case(row.case.name, documents[row.case.name])
            for pair in FIRING if "firing" in args.cases else ():
                documents[pair[0].name] = firing_measured(pair, args, folder)
                print_case(pair[0].name, documents[pair[0].name])
    except (Missing, LavaError, ElsewhereError) as error:
        print(f"bench simulator --peers: {error}", file=sys.stderr)
        return 1
    reached = targets(documents)
    print_targets(reached)
    short = {case: {arm: ratio["median"] for arm, ratio in found["ratios"].items()} for case, found in documents.items()}
    finish(
        {"ratios": short, "targets": reached, "threads": args.threads, "cases": documents},
        "bench-simulator-peers",
        headline=("ratios", "targets", "threads"),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
