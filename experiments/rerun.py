"""Repeat a run, training or deployment, from nothing but its folder, and say whether the numbers came out the same."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from experiments.runs.folder import NoRun, RunError, git_state, read_json, versions
from experiments.runs.hydra_app import ConfigError, to_dataclass
from experiments.runs.output import add_json_argument, finish
from experiments.runs.plain_json import write_json

COMPARED = {
    "train": ("loss_nats", "bits_per_byte", "tokens", "steps", "flops", "reference_s"),
    "deploy": ("loss_float_nats", "loss_quantised_nats", "loss_simulated_nats", "synops_per_token", "events_per_token"),
}


HELP = "repeat a run from its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", type=Path, help="folder of a training run or a deployment")
    parser.add_argument("--out", type=Path, default=None, help="folder of the repetition (default: FOLDER-rerun)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """The command: see `rerun`."""
    return rerun(args.folder, args.out)


def rerun(folder: Path, out: Path | None = None) -> int:
    """Run `folder`'s configuration again, on its own table of component times, into `out`.

    Returns the exit code: 0; 1 it cannot be repeated, or failed; 2 there is no run in `folder`.
    """
    from experiments.deploy import EXPECTED as DEPLOYING
    from experiments.train import EXPECTED as TRAINING

    try:
        document = repeat(folder, out or folder.with_name(f"{folder.name}-rerun"))
    except (ConfigError, RunError, *TRAINING, *DEPLOYING) as error:
        print(f"rerun: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | NoRun) else 1
    for name, (before, now) in document["compared"].items():
        print(f"{name}: {before} then, {now} now{'' if before == now else '  DIFFERENT'}")
    for what in document["changed_since"]:
        print(f"changed since: {what}")
    finish(document, "rerun", file=write_json(Path(document["run"]) / "rerun.json", document))
    return 0


def repeat(folder: Path, out: Path) -> dict[str, Any]:
    """{"equal", "compared": {name: [then, now]}, "changed_since", "run"} of a finished run repeated into `out`.

    A training run keeps its own table of component times. Raises RunError for a folder that holds no finished run, and for
    an `out` that holds a run already.
    """
    from omegaconf import OmegaConf

    from experiments.deploy import DeployConfig, deploy
    from experiments.runs.own.single import repeat_own
    from experiments.train import TrainConfig, train

    record = read_json(folder / "run.json")
    kind = str(record.get("kind"))
    if kind not in COMPARED or record.get("status") != "finished":
        raise RunError(f"{folder} is no finished training run or deployment ({kind}, {record.get('status')})")
    if (out / "run.json").exists():
        raise RunError(f"{out} holds a run already: name another folder with --out FOLDER, or delete this one")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    if kind == "train" and "module" in settings:
        if not settings["module"]:
            raise RunError(f"{folder}: its model was given from Python, so that the script that made it is what repeats it")
        before = read_json(folder / "result.json")
        now = repeat_own(folder, out)
    elif kind == "train":
        settings |= {"run": str(out), "resume": False}
        settings["trainer"]["component_times"] = str(folder / "component_times.json")
        before = read_json(folder / "result.json")
        now = train(to_dataclass(OmegaConf.create(settings), TrainConfig))
    else:
        before = read_json(folder / "deploy.json")
        now = deploy(to_dataclass(OmegaConf.create(settings | {"out": str(out)}), DeployConfig))
    compared = {name: [before[name], now[name]] for name in COMPARED[kind]}
    changed = [
        f"{name} {record['versions'].get(name)} -> {version}"
        for name, version in versions().items()
        if record["versions"].get(name) != version
    ]
    if record["git"]["commit"] != (commit := git_state()["commit"]):
        changed.append(f"commit {record['git']['commit']} -> {commit}")
    return {
        "run": str(out),
        "of": str(folder),
        "equal": all(a == b for a, b in compared.values()),
        "compared": compared,
        "changed_since": changed,
    }
