"""`spikegate bench clean`: what training spends less on, on clean text, against two dense controls that are always shown.

Runs a sweep (`configs/sweep/growth.yaml`) and judges it. The first control is dense training at the final size, the second
the best dense model of any depth and width at the same budget, chosen on a seed of its own: arms named dense_... of the
sweep. Where the second one is ahead of the first, the large model is the mistake, and beating it alone says little. For
every other arm: the time to the dense end loss as a share of the dense time, in reference seconds, and the difference in
nats from both controls at the full budget, each with a paired one-sided test over seeds, p-values adjusted by Holm.

The same command goes on where it stopped; finished runs are not made again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.comparison.collection import collect
from experiments.comparison.record import Arm, Stream, is_control
from experiments.comparison.statistics import PairedTest, holm, p_text, paired_test
from experiments.comparison.targets import Reached, times_to_dense
from experiments.runs.folder import RunError
from experiments.runs.hydra_app import EXIT_CONFIG, EXIT_FAILED, ConfigError
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.runs.sweeps.plan import Job, Sweep, finished
from experiments.runs.sweeps.reading import SweepError, find_sweep, read_sweep, seeds_of
from experiments.sweep import sweep
from hardware.text import listed

DENSE = "dense"


class ControlError(RuntimeError):
    """A comparison without one of its controls; the message names it and the remedy."""


def judge(stream: Stream) -> dict[str, Any]:
    """Both controls, and every other arm against them.

    The best dense arm is the one of the lowest mean loss at the full budget, so that chance is on the controls' side.
    Raises ControlError where dense, a dense_... arm, or every other arm is missing.
    """
    if DENSE not in stream.arms:
        raise ControlError(f"no finished run of arm dense at the full budget: there are {listed(stream.arms) or 'none'}")
    smaller = {name: arm for name, arm in stream.arms.items() if name.startswith("dense_")}
    if not smaller:
        raise ControlError("no finished run of a dense model of another size (arms dense_...), the second control")
    grown = {name: arm for name, arm in stream.arms.items() if not is_control(name)}
    if not grown:
        raise ControlError("no finished run of an arm that is no control: nothing to judge")
    dense = stream.arms[DENSE]
    best = min((dense, *smaller.values()), key=lambda arm: arm.loss.mean)
    times = {reached.arm: reached for reached in times_to_dense(stream)}
    tests: dict[tuple[str, str], PairedTest] = {}
    for name, arm in grown.items():
        if name in times and DENSE in times[name].against:
            tests[name, "time_to_dense"] = times[name].against[DENSE]
        for key, control in (("against_dense", dense), ("against_best_dense", best)):
            found = _paired(arm, control)
            if found is not None:
                tests[name, key] = found
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    arms = {name: _arm(arm, times.get(name), tests, adjusted) for name, arm in grown.items()}
    small = {name: _control(arm) | _time(times.get(name)) for name, arm in smaller.items()}
    return {"controls": {DENSE: _control(dense), **small}, "best_dense": best.name, "arms": arms}


def _paired(arm: Arm, control: Arm) -> PairedTest | None:
    ours, theirs = ({run.seed: float(run.result["loss_nats"]) for run in side.runs} for side in (arm, control))
    shared = sorted(ours.keys() & theirs.keys())
    return paired_test([ours[s] for s in shared], [theirs[s] for s in shared]) if len(shared) > 1 else None


def _control(arm: Arm) -> dict[str, Any]:
    shape = {key: arm.runs[0].settings.get(f"model.{key}") for key in ("layers", "width")}
    parameters = {float(run.result.get("params") or math.nan) for run in arm.runs}
    tokens = math.fsum(float(run.result["tokens"]) for run in arm.runs) / len(arm.runs)
    return {
        "loss_nats": arm.loss.mean,
        "interval": None if arm.loss.low is None else [arm.loss.low, arm.loss.high],
        "n": arm.loss.n,
        "seeds": list(arm.seeds),
        "tokens_per_parameter": tokens / parameters.pop() if len(parameters) == 1 else None,
        **shape,
    }


def _time(reached: Reached | None) -> dict[str, Any]:
    return {} if reached is None else {"time_to_dense": reached.share.to_json(), "time_text": reached.share.text()}


def _arm(
    arm: Arm,
    reached: Reached | None,
    tests: Mapping[tuple[str, str], PairedTest],
    adjusted: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    found = _control(arm) | _time(reached)
    if (arm.name, "time_to_dense") in tests:
        found["time_p"] = adjusted[arm.name, "time_to_dense"]
    for key in ("against_dense", "against_best_dense"):
        test = tests.get((arm.name, key))
        if test is not None:
            interval = None if test.low is None else [test.low, test.high]
            found[key] = {"nats": test.difference, "interval": interval, "p": adjusted[arm.name, key]}
    return found


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table: the controls first, then what is judged by them."""
    best = document["best_dense"]
    said = [f"{'arm':<22} {'loss, nats':<26} {'time to dense':<44} {'against dense':<24} against {best}"]
    for name, found in {**document["controls"], **document["arms"]}.items():
        spread = "" if found["interval"] is None else " [{:.4f}, {:.4f}]".format(*found["interval"])
        time = "1" if name == DENSE else found.get("time_text", "not asked")
        if "time_p" in found:
            time += f", {p_text(found['time_p'])}"
        cells = [_difference(found.get(key)) for key in ("against_dense", "against_best_dense")]
        said.append(f"{name:<22} {found['loss_nats']:.4f}{spread:<19} {time:<44} {cells[0]:<24} {cells[1]}")
    return said


def _difference(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['nats']:+.4f}, {p_text(found['p'])}"


def conclude(plan: Sweep, wanted: Sequence[Job], missing: dict[str, str]) -> int:
    """Judge what is finished, print table and document; 1 where something is missing."""
    runs = sorted({str(job.folder(plan.folder)) for job in wanted if finished(job.folder(plan.folder))})
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    try:
        streams = list(collect(runs).streams.values())
        if len(streams) != 1:
            raise ControlError(f"{plan.folder}: finished runs of {len(streams)} streams, where one is judged")
        document = judge(streams[0])
    except ControlError as error:
        print(f"bench clean: {error}", file=sys.stderr)
        return EXIT_FAILED
    print("\n".join(lines(document)))
    tuned = {arm.name: list(plan.chosen(arm)) for arm in plan.arms if arm.name not in plan.untuned() and plan.chosen(arm)}
    document |= {
        "folder": str(plan.folder),
        "budget_reference_s": plan.budget_reference_s,
        "settings": {arm.name: list(arm.settings) for arm in plan.arms},
        "tuned": tuned,
        "missing": missing,
    }
    finish(document, "bench-clean", file=write_json(plan.folder / "clean.json", document))
    return EXIT_FAILED if missing else 0


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Run and judge; exit code 0, 1 where a run or a control is missing, 2 for a wrong word, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="spikegate bench clean", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sweep", default="growth", help="a shipped sweep or a sweep file (growth)")
    parser.add_argument("--jobs", type=int, default=1, help="training processes at a time (1)")
    parser.add_argument("--threads", type=int, default=0, help="threads of each (the cores divided by --jobs)")
    parser.add_argument("--seeds", default="", help="other seeds than the file's, e.g. 0,1,2")
    parser.add_argument("--tokens", type=int, default=0, help="another dense budget, tokens of plain training")
    parser.add_argument("--folder", default="", help="another folder than the file's")
    add_json_argument(parser)
    given = parser.parse_args(argv)
    try:
        if given.jobs < 1 or given.threads < 0 or given.tokens < 0:
            raise SweepError("--jobs must be at least 1, --threads and --tokens not negative")
        plan = read_sweep(find_sweep(given.sweep))
        if given.seeds:
            plan = replace(plan, seeds=seeds_of(given.seeds))
        if given.tokens:
            plan = replace(plan, budget_tokens=given.tokens, budget_reference_s=0.0)
        if given.folder:
            plan = replace(plan, folder=Path(given.folder))
        threads = given.threads or max(1, (os.cpu_count() or 1) // given.jobs)
        return sweep(plan, given.jobs, threads, conclude=conclude)
    except (SweepError, RunError, ConfigError) as error:
        print(f"bench clean: {error}", file=sys.stderr)
        return EXIT_CONFIG
