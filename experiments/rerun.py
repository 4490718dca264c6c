"""Repeat a run, training or deployment, from nothing but its folder, and say whether the numbers came out the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.runs.folder import NoRun, RunError, git_state, read_json, versions
from experiments.runs.hydra_app import ConfigError, to_dataclass
from experiments.runs.output import add_json_argument, finish
from experiments.runs.plain_json import write_json
from hardware.documents import read_yaml
from hardware.text import short

COMPARED = {
    "train": ("loss_nats", "bits_per_byte", "tokens", "steps", "flops", "reference_s"),
    "deploy": ("loss_float_nats", "loss_quantised_nats", "loss_simulated_nats", "synops_per_token", "events_per_token"),
}


HELP = "repeat a run from its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", type=Path, help="folder of a training run or a deployment")
    parser.add_argument("--out", type=Path, default=None, help="folder of the repetition (default: FOLDER-rerun)")
    parser.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="NAME",
        help="code of your own that the record names and that may be run: MODULE:FUNCTION, or a plugin; repeatable",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """The command: see `rerun`."""
    return rerun(args.folder, args.out, args.code)


def rerun(folder: Path, out: Path | None = None, code: Collection[str] = ()) -> int:
    """Run `folder`'s configuration again, on its own table of component times, into `out`.

    Returns the exit code: 0; 1 it cannot be repeated, or failed; 2 there is no run in `folder`, its settings are none of
    this version, or it names code that is not in `code`.
    """
    from experiments.deploy import EXPECTED as DEPLOYING
    from experiments.train import EXPECTED as TRAINING

    try:
        document = repeat(folder, out or folder.with_name(f"{folder.name}-rerun"), code)
    except (ConfigError, RunError, *TRAINING, *DEPLOYING) as error:
        print(f"rerun: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | NoRun) else 1
    for name, (before, now) in document["compared"].items():
        print(f"{name}: {before} then, {now} now{'' if before == now else '  DIFFERENT'}")
    for what in document["changed_since"]:
        print(f"changed since: {what}")
    finish(document, "rerun", file=write_json(Path(document["run"]) / "rerun.json", document))
    return 0


def repeat(folder: Path, out: Path, code: Collection[str] = ()) -> dict[str, Any]:
    """{"equal", "compared": {name: [then, now]}, "changed_since", "run"} of a finished run repeated into `out`.

    What runs is training or deployment, with settings that are checked like those of a command line; the command that the
    record holds is not looked at. A training run keeps its own table of component times.

    Args:
        code: modules of the user's own, of those that the settings name, which may be imported.

    Raises:
        RunError: a folder that holds no finished run, records of another form, or an `out` that holds a run already.
        ConfigError: settings that this version does not have, or code that is not in `code`.
    """
    from omegaconf import OmegaConf

    from experiments.deploy import DeployConfig, deploy
    from experiments.runs.own.single import repeat_own
    from experiments.train import TrainConfig, train

    record = read_json(folder / "run.json")
    kind = str(record.get("kind"))
    if kind not in COMPARED or record.get("status") != "finished":
        raise RunError(f"{folder} is no finished training run or deployment ({short(kind)}, {short(record.get('status'))})")
    if (out / "run.json").exists():
        raise RunError(f"{out} holds a run already: name another folder with --out FOLDER, or delete this one")
    before = read_json(folder / ("result.json" if kind == "train" else "deploy.json"))
    if missing := [name for name in COMPARED[kind] if name not in before]:
        raise RunError(f"{folder}: its result has no {missing[0]}, so that nothing can be compared")
    settings = settings_of(folder)
    check_code(folder, settings, code)
    if kind == "train" and "module" in settings:
        if not settings["module"]:
            raise RunError(f"{folder}: its model was given from Python, so that the script that made it is what repeats it")
        now = repeat_own(folder, settings, out)
    elif kind == "train":
        settings |= {"run": str(out), "resume": False}
        if not isinstance(settings.get("trainer"), dict):
            raise ConfigError(
                f"{folder / 'config.yaml'}: trainer is {short(settings.get('trainer'))}; its settings are needed"
            )
        settings["trainer"]["component_times"] = str(folder / "component_times.json")
        now = train(to_dataclass(OmegaConf.create(settings), TrainConfig))
    else:
        now = deploy(to_dataclass(OmegaConf.create(settings | {"out": str(out)}), DeployConfig))
    compared = {name: [before[name], now[name]] for name in COMPARED[kind]}
    return {
        "run": str(out),
        "of": str(folder),
        "equal": all(a == b for a, b in compared.values()),
        "compared": compared,
        "changed_since": _changed_since(record),
    }


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings in a run's folder. Raises NoRun where there are none, RunError for a file that is no mapping."""
    path = folder / "config.yaml"
    try:
        found = read_yaml(path, RunError)
    except FileNotFoundError:
        raise NoRun(f"{path}: no such file; is {folder} a run folder?") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RunError(f"{path}: settings by name are needed; found {short(found)}")
    return found


def check_code(folder: Path, settings: Mapping[str, Any], code: Collection[str]) -> None:
    """Raise ConfigError where settings name code of somebody's own, to be imported and run, that `code` does not."""
    for key, value in _named_code("", settings):
        for name in value if isinstance(value, list) else [value]:
            if name and name not in code:
                raise ConfigError(
                    f"{folder / 'config.yaml'}: {key} names {short(str(name))!r}, code that is not of this package and "
                    "would be run. If it is yours, or you have read it, allow it: --code NAME, written as there"
                )


def _named_code(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _named_code(f"{prefix}{name}.", value)
        elif name in ("module", "plugins"):
            yield f"{prefix}{name}", value


def _changed_since(record: Mapping[str, Any]) -> list[str]:
    """Versions and the commit that are others now than in the record; what it does not say is not compared."""
    then, git = (record[key] if isinstance(record.get(key), dict) else {} for key in ("versions", "git"))
    changed = [f"{name} {then[name]} -> {now}" for name, now in versions().items() if name in then and then[name] != now]
    commit = git_state()["commit"]
    return changed + ([f"commit {git['commit']} -> {commit}"] if "commit" in git and git["commit"] != commit else [])
