"""Any torch module on any samples: converted, simulated, counted, priced, and held against its own float answers."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from experiments.runs.claim import clear, differences
from experiments.runs.deploy_config import RouteConfig
from experiments.runs.deployment import Advance, per_token
from experiments.runs.folder import RunError, new_record, read_json
from experiments.runs.hydra_app import ConfigError
from experiments.runs.lock import exclusive
from experiments.runs.placed import Placed, extrapolated, host_energy, price, put_on_cores, thresholds, with_time_steps
from experiments.runs.plain_json import plain, write_json
from experiments.runs.progress import Bar
from experiments.runs.samples.judging import Judged, JudgeError, Readout, judge
from experiments.runs.samples.model import trained_module
from experiments.runs.samples.outcome import Outcome, answered
from experiments.runs.samples.settings import DeployModuleConfig
from experiments.runs.samples.spiking import LIF, as_streams, deploy_spiking
from experiments.runs.samples.spiking_record import spiking_outcome
from experiments.samples.records import DataError, Samples, SettingError
from experiments.samples.sets import Recording, load_samples
from experiments.views.samples.written import write_views
from hardware.chips.chip import load_chip
from hardware.datafile import DataFileError
from hardware.energy.account import Counts, EnergyReport, load_profile
from hardware.placement import DoesNotFit
from neuro.analysis.compatibility import CompatibilityReport, NothingToMap, analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.plan import Plan
from neuro.conversion.routes import convert
from neuro.conversion.spiking.description import NotConvertible
from neuro.deployment.deployed import Deployed
from neuro.deployment.deployed import deploy as deployed_model

KIND = "deploy_module"
EXPECTED = (RunError, DataError, JudgeError, NothingToMap, DoesNotFit, DataFileError)
"""Errors whose message says all."""
MAY_DIFFER = {"out", "progress", "threads"}


def deploy_module(cfg: DeployModuleConfig) -> dict[str, Any]:
    """Deploy in the settings' folder and return the record, the content of `deploy.json`.

    The same command again returns the record of a finished deployment; one that broke off is made anew.

    Raises ConfigError for a folder of another deployment, a module or file that is not there or is another one by now.
    """
    folder = cfg.folder
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    _check_names(cfg)
    made = not folder.exists()
    with exclusive(folder, "deploying"):
        try:
            return _deployed(cfg, folder)
        except (ConfigError, *EXPECTED) as error:
            if made:  # what is refused leaves no folder
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, SettingError):
                raise ConfigError(str(error)) from error
            raise


def _check_names(cfg: DeployModuleConfig) -> None:
    """A wrong name of a chip or of a profile is said before the work, not after."""
    try:
        load_chip(cfg.chip)
        for name in cfg.profiles:
            load_profile(name)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error


def _deployed(cfg: DeployModuleConfig, folder: Path) -> dict[str, Any]:
    sources = source_hashes(cfg)
    if _finished(folder, cfg, sources):
        print(f"{folder} holds the finished deployment already: nothing to do", file=sys.stderr)
        return read_json(folder / "deploy.json") | {"folder": str(folder)}
    samples = load_samples(
        cfg.data,
        cfg.path,
        seed=cfg.seed,
        scale=cfg.scale,
        calibration=cfg.calibration_samples,
        recording=Recording(cfg.step_us, cfg.steps, (cfg.sensor[0], cfg.sensor[1]), cfg.flat),
    ).held_out(cfg.eval_samples)
    model = trained_module(cfg.module, cfg.weights)
    clear(folder)
    shutil.rmtree(folder / "plan", ignore_errors=True)
    record = new_record(KIND, module=cfg.module, data=cfg.data, route=cfg.route, sources=sources)
    write_json(folder / "run.json", record)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(cfg), sort_keys=False))
    readout = Readout(cfg.readout, cfg.step_axis)
    outcome = (
        _spiking(model, samples, cfg)
        if cfg.route == LIF
        else measure(
            model,
            samples,
            cfg,
            readout=readout,
            batch=cfg.batch,
            calibration_samples=cfg.calibration_samples,
            placing_samples=cfg.placing_samples,
            name=cfg.module,
        )
    )
    document = {"folder": str(folder), **outcome.document}
    outcome.save(folder / "plan")
    write_json(folder / "deploy.json", document)
    write_views(
        folder,
        document,
        yaml.safe_dump(plain(cfg), sort_keys=False),
        data=samples.y[0],
        answers={which: outcome.judged[which].answers[0] for which in ("float", "simulated")},
        placement=outcome.placement,
        messages=outcome.messages,
    )
    write_json(folder / "run.json", record | {"status": "finished"})
    return document


def _spiking(model: nn.Module, samples: Samples, cfg: DeployModuleConfig) -> Outcome:
    """By route lif. Raises RunError, with what `neuro` says, for a network that cannot be converted."""
    streams = as_streams(samples, cfg.lif.time_steps)
    try:
        found = deploy_spiking(
            model,
            streams,
            cfg.lif,
            chip=cfg.chip,
            chips=cfg.chips or None,
            profiles=cfg.profiles,
            readout=Readout(cfg.readout, cfg.step_axis),
            batch=cfg.batch,
            calibration_samples=cfg.calibration_samples,
            counted_samples=cfg.placing_samples,
        )
    except NotConvertible as error:
        raise RunError(f"{type(model).__name__} cannot be converted: {error}") from error
    return spiking_outcome(model, streams, found, cfg.lif, chip=cfg.chip, name=cfg.module)


def _finished(folder: Path, cfg: DeployModuleConfig, sources: dict[str, str]) -> bool:
    """Whether the folder holds this deployment whole. Raises ConfigError where it holds something else."""
    if not (folder / "run.json").exists():
        return False
    record = read_json(folder / "run.json")
    if record.get("kind") != KIND:
        raise ConfigError(f"{folder} already holds a {record.get('kind')} run: choose another folder with out=FOLDER")
    if record.get("status") != "finished" or not (folder / "deploy.json").exists():
        return False
    differ = differences(folder, cfg, MAY_DIFFER, required=True)
    differ += [f"{name} has changed" for name, value in sources.items() if record.get("sources", {}).get(name) != value]
    if differ:
        raise ConfigError(
            f"{folder} holds a finished deployment that was made otherwise ({'; '.join(differ)}): choose another folder "
            "with out=FOLDER"
        )
    return True


def source_hashes(cfg: DeployModuleConfig) -> dict[str, str]:
    """SHA-256 of the files that a deployment reads: the module's source, the weights, the arrays; of those there are."""
    paths = {"weights": cfg.weights, "path": cfg.path}
    name = cfg.module.partition(":")[0]
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin:
        paths["module"] = spec.origin
    return {
        key: hashlib.sha256(Path(place).read_bytes()).hexdigest()
        for key, place in paths.items()
        if place and Path(place).is_file()
    }


def measure(
    model: nn.Module,
    samples: Samples,
    cfg: RouteConfig,
    *,
    readout: Readout = Readout(),  # noqa: B008 - frozen
    batch: int = 64,
    calibration_samples: int = 256,
    placing_samples: int = 16,
    name: str = "",
) -> Outcome:
    """Convert, simulate, count and price one module; nothing is written.

    Args:
        model: trained, in eval mode; not changed.
        samples: its ranges are set on `x_train`, all else is measured on `x`.
        cfg: route, chip, widths and profiles.
        readout, batch, calibration_samples, placing_samples: as the settings of the same names.
        name: of the model, for the record.

    Raises JudgeError for answers that do not fit the data's, RunError for what cannot be converted, NothingToMap,
    DoesNotFit.
    """
    with _bar(cfg, "float", len(samples.x)) as shown:
        judged = {"float": judge(model, samples, readout, batch, shown)}
    report, plan = converted(model, samples, cfg, calibration_samples, batch)
    with _bar(cfg, "quantised", len(samples.x)) as shown:
        judged["quantised"] = judge(deployed_model(model, plan, backend="quantised"), samples, readout, batch, shown)
    simulated = deployed_model(model, plan, backend="fixed_point")
    with _bar(cfg, "simulated", len(samples.x)) as shown:
        judged["simulated"] = judge(simulated, samples, readout, batch, shown)
    counts = with_time_steps(_per_sample(simulated, len(samples.x)), plan)
    health = simulated.health()
    mapped = [c for c in counts if not c.host]
    placing = torch.from_numpy(samples.x[: max(1, min(placing_samples, batch))])
    placed = put_on_cores(simulated, mapped, placing, cfg.chip, cfg.chips or None)
    profiles = [load_profile(each) for each in cfg.profiles]
    energies = [price(mapped, profile, placed) for profile in profiles]
    if plan.chip == "loihi2":
        energies.append(extrapolated(mapped, placed))
    document = _document(model, samples, cfg, report, plan, judged, counts, placed, energies, name)
    document |= {"host_energy": _of_sample(host_energy(counts)), **thresholds(mapped, profiles, placed)}
    document |= {
        "clipped_inputs": sum(h.clipped_inputs for h in health),
        "saturations": sum(h.wide + h.payload_overflows for h in health),
        "wraps": sum(h.wraps for h in health),
        "health": [asdict(h) for h in health],
        "notes": [*samples.notes, *simulated.notes()],
    }
    return Outcome(judged, counts, placed.placement, placed.messages, plan, None, document)


def converted(
    model: nn.Module, samples: Samples, cfg: RouteConfig, calibration_samples: int, batch: int
) -> tuple[CompatibilityReport, Plan]:
    """Verdicts and integer graphs, a token of them being one sample.

    Raises RunError, with what `neuro` says, for a model or samples that cannot be converted; NothingToMap; DoesNotFit.
    """
    training = torch.from_numpy(samples.x_train[:calibration_samples])
    try:
        report = analyse(model, training[:1], cfg.chip, route=cfg.route, chips=cfg.chips or None, tokens=1)
        ranges = calibrate(model, training.split(batch), percentile=cfg.percentile, method=cfg.calibration_method)
        return report, convert(model, ranges, report, cfg.settings)
    except EXPECTED:
        raise
    except ValueError as error:
        raise RunError(f"{type(model).__name__} cannot be converted: {error}") from error


def _per_sample(simulated: Deployed, samples: int) -> list[Counts]:
    """Counts with a token for each sample, whatever rows a layer saw of it."""
    return [replace(item, tokens=samples) for item in simulated.counts()]


def _of_sample(energy: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if energy is None else energy | {"per": "sample"}


def _document(
    model: nn.Module,
    samples: Samples,
    cfg: RouteConfig,
    report: CompatibilityReport,
    plan: Plan,
    judged: dict[str, Judged],
    counts: Sequence[Counts],
    placed: Placed,
    energies: Sequence[EnergyReport],
    name: str,
) -> dict[str, Any]:
    n = len(samples.x)
    mapped = [c for c in counts if not c.host]
    on_chip = sum(c.dense_macs for c in mapped) / n
    host = (
        f"host share: {report.macs_per_token - on_chip:,.0f} of {report.macs_per_token:,.0f} MACs per sample run on the "
        "host, in no row here"
    )
    placement = placed.placement
    return {
        **answered(model, samples, judged, name, cfg.chip, cfg.route),
        "settings": asdict(cfg.settings),
        "mapped_mac_share": report.mac_share,
        "macs_per_sample": report.macs_per_token,
        "mapped_macs_per_sample": on_chip,
        "host_crossings_per_sample": report.crossings_per_token,
        "events_per_sample": sum(c.events for c in mapped) / n,
        "synops_per_sample": sum(c.synops for c in mapped) / n,
        "synops_fraction": sum(c.synops for c in mapped) / max(1, sum(c.dense_macs for c in mapped)),
        "neuron_updates_per_sample": sum(c.neuron_updates for c in mapped) / n,
        "time_steps_per_sample": mapped[0].time_steps,
        "max_payload_bits": max(c.payload_bits for c in mapped),
        "cores": len(placement.cores) if placement else None,
        "chips": placement.chips if placement else None,
        "layers": [_layer(c, n) for c in counts],
        "compatibility": report.table(),
        "conversion": plan.table(),
        "energy": [per_token(e, host) | {"per": "sample"} for e in energies],
        **placed.record(),
    }


def _layer(counts: Counts, samples: int) -> dict[str, Any]:
    totals = ("synops", "events", "neuron_updates_active", "neuron_updates_inactive", "dense_macs")
    raw = asdict(counts)
    rest = {key: value for key, value in raw.items() if key not in totals and key != "tokens"}
    return rest | {f"{key}_per_sample": raw[key] / samples for key in totals}


@contextmanager
def _bar(cfg: RouteConfig, name: str, samples: int) -> Iterator[Advance]:
    """A progress bar on stderr over so many samples."""
    with Bar(name, samples, "samples", cfg.progress) as shown:
        yield shown.advance
