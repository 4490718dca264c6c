"""Put a trained run on the simulated chip: `python -m experiments.deploy run=RUN`, or `spikegate deploy ...`.

`spikegate deploy module=PACKAGE:FUNCTION data=NAME` puts any torch module on it, judged on any samples
(`experiments.runs.samples`).

`route` chooses the conversion; its settings are under `conversion` (graded), `sigma_delta` and `rate`. Losses of the float
model, of its quantised twin and of the simulated chip are over the same held-out tokens; intervals are 95 % t-intervals
over windows, of differences paired.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from experiments.runs import solving
from experiments.runs.claim import clear
from experiments.runs.deploy_config import DeployConfig
from experiments.runs.deployment import (
    Advance,
    HeldOut,
    Sample,
    energy_markdown,
    errors_of_layers,
    evenly,
    held_out_loss,
    in_mode_chip,
    layer_record,
    layers_markdown,
    losses_text,
    one_layer_at_a_time,
    per_token,
    sample,
    samples_markdown,
)
from experiments.runs.folder import new_record, read_json
from experiments.runs.hydra_app import ConfigError, run_app
from experiments.runs.lock import exclusive
from experiments.runs.output import finish
from experiments.runs.placed import Placed, extrapolated, host_energy, price, put_on_cores, thresholds, with_time_steps
from experiments.runs.plain_json import write_json
from experiments.runs.progress import Bar
from experiments.runs.samples.deployment import EXPECTED as EXPECTED_OF_MODULE
from experiments.runs.samples.deployment import deploy_module
from experiments.runs.samples.settings import DeployModuleConfig
from experiments.runs.solving import Questions, questions_of
from experiments.runs.trained import EXPECTED, calibration_windows, converted, load_run
from experiments.views.chip_figure import chip_figure
from experiments.views.rasters import raster_figure
from experiments.views.samples.tables import lines
from experiments.views.samples.written import PAGE
from experiments.views.terminal import compatibility_text, in_lines, terminal_width
from experiments.views.tracking import Tracker
from hardware.energy.account import Profile, load_profile
from hardware.markdown import fenced
from hardware.meters.meter import Meter, total
from neuro.analysis.compatibility import CompatibilityReport
from neuro.conversion.plan import Plan, save_plan
from neuro.deployment.deployed import deploy as deployed_model
from sparse_update.data.records import Corpus
from sparse_update.data.regimes import held_out as held_out_sets
from sparse_update.transformer import Transformer

__all__ = ["EXPECTED", "DeployConfig", "calibration_windows", "converted", "deploy", "layer_record", "load_run", "main"]

PLACING_TOKENS = 256  # held-out tokens whose messages are measured neuron by neuron
MODELS = ("float", "quantised", "simulated")
HEADLINE = ["folder", "run", "stream", "arm", "seed", "chip", "route", "ran_on", "loss_float_nats", "loss_quantised_nats"]
HEADLINE += ["loss_simulated_nats", "delta_simulated", "val_tokens", "mapped_mac_share", "macs_per_token"]
HEADLINE += ["mapped_macs_per_token", "events_per_token", "synops_per_token", "synops_fraction", "max_payload_bits"]
HEADLINE += ["saturations", "wraps", "energy"]
HEADLINE_OF_MODULE = ["folder", "module", "data", "route", "chip", "ran_on", "samples", "accuracy", "nrmse", "less_float"]
HEADLINE_OF_MODULE += [
    "agreement",
    "mapped_mac_share",
    "macs_per_sample",
    "synops_per_sample",
    "events_per_sample",
    "cores",
]
HEADLINE_OF_MODULE += ["chips", "clipped_inputs", "saturations", "wraps"]


def deploy(cfg: DeployConfig) -> dict[str, Any]:
    """Convert, simulate, count and price one run; returns its record, the content of `deploy.json`."""
    run = Path(cfg.run)
    out = Path(cfg.out) if cfg.out else run / "deploy"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for name in cfg.profiles:  # a wrong name is said before the work, not after
        load_profile(name)
    _refuse(out)
    model, corpus, data, trained = load_run(run)
    say(f"calibrating on {cfg.calibration_tokens:,} training tokens; {cfg.route} route")
    asked = questions_of(run, model.cfg.context, cfg.questions)
    if asked is None:
        training = calibration_windows(cfg, corpus, data, model.cfg.context, trained["seed"])
        held_out = held_out_sets(corpus, data, model.cfg.context, cfg.eval_tokens)["val"]  # what the run was judged by
    else:
        training, held_out = asked.training(cfg.calibration_tokens), asked.held_out(cfg.eval_tokens)
    report, plan = converted(cfg, model, training)
    with exclusive(out, "deploying"):
        _refuse(out)
        clear(out)
        return _deploy(cfg, run, out, model, corpus, trained, report, plan, held_out, asked)


def _refuse(out: Path) -> None:
    """Raise ConfigError for a folder with a finished deployment or another run; one that broke off is made anew."""
    record = read_json(out / "run.json") if (out / "run.json").exists() else {"kind": "deploy"}
    if record.get("kind") != "deploy" or record.get("status") == "finished":
        what = "deployment" if record.get("kind") == "deploy" else f"{record.get('kind')} run"
        raise ConfigError(f"{out} already holds a {what}: choose another folder with out=FOLDER")


def _deploy(
    cfg: DeployConfig,
    run: Path,
    out: Path,
    model: Transformer,
    corpus: Corpus,
    trained: dict[str, Any],
    report: CompatibilityReport,
    plan: Plan,
    held_out: Tensor,
    asked: Questions | None,
) -> dict[str, Any]:
    """Measure the converted model in `out`, which is held for it. `held_out`: int64 (N, T + 1)."""
    record = new_record("deploy", stream=trained["stream"], arm=trained["arm"], seed=trained["seed"], run=str(run))
    write_json(out / "run.json", record)
    (out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
    shutil.rmtree(out / "plan", ignore_errors=True)  # of a deployment that broke off
    save_plan(plan, out / "plan")

    tokens = held_out[:, 1:].numel()
    with Meter() as meter:
        plain = measured(cfg, "float", model, held_out)
    quantised = measured(cfg, "quantised", deployed_model(model, plan, backend="quantised"), held_out)
    simulated = deployed_model(model, plan, backend="fixed_point")
    chip = measured(cfg, "simulated", simulated, held_out)
    counts, health = with_time_steps(simulated.counts(), plan), simulated.health()

    mapped = [c for c in counts if not c.host]
    say("cores and time")
    placed = put_on_cores(simulated, mapped, evenly(held_out, PLACING_TOKENS)[:, :-1], cfg.chip, cfg.chips or None)
    profiles = [load_profile(name) for name in cfg.profiles]
    energy = [price(mapped, profile, placed) for profile in profiles]  # every profile prices the same layers
    if plan.chip == "loihi2":
        energy.append(extrapolated(mapped, placed))
    host_macs = report.macs_per_token - sum(c.dense_macs for c in mapped) / tokens
    host = f"host share: {host_macs:,.0f} of {report.macs_per_token:,.0f} MACs per token run on the host, in no row here"
    document = {
        "folder": str(out),
        "run": str(run),
        "stream": trained["stream"],
        "arm": trained["arm"],
        "seed": trained["seed"],
        "chip": cfg.chip,
        "route": cfg.route,
        "settings": asdict(cfg.settings),
        "ran_on": "simulated (ours, lava)",
        "loss_float_nats": plain.nats,
        "loss_quantised_nats": quantised.nats,
        "loss_simulated_nats": chip.nats,
        "loss_float_interval": plain.interval,
        "loss_quantised_interval": quantised.interval,
        "loss_simulated_interval": chip.interval,
        "delta_quantised": quantised.less(plain),
        "delta_simulated": chip.less(plain),
        "val_tokens": tokens,
        "mapped_mac_share": report.mac_share,
        "mapped_parameter_share": report.parameter_share,
        "macs_per_token": report.macs_per_token,
        "mapped_macs_per_token": sum(c.dense_macs for c in mapped) / tokens,
        "events_per_token": sum(c.events for c in mapped) / tokens,
        "synops_per_token": sum(c.synops for c in mapped) / tokens,
        "synops_fraction": sum(c.synops for c in mapped) / sum(c.dense_macs for c in mapped),
        "neuron_updates_per_token": sum(c.neuron_updates_active + c.neuron_updates_inactive for c in mapped) / tokens,
        "max_payload_bits": max(c.payload_bits for c in mapped),
        "clipped_inputs": sum(h.clipped_inputs for h in health),
        "saturations": sum(h.wide + h.payload_overflows for h in health),
        "wraps": sum(h.wraps for h in health),
        "layers": [layer_record(c, tokens) for c in counts],
        "health": [asdict(h) for h in health],
        "compatibility": report.table(),
        "conversion": plan.table(),
        "energy": [per_token(e, host) for e in energy],
        **placed.record(),
        "host_energy": host_energy(counts),
        **thresholds(mapped, profiles, placed),
        "host_inference_energy": [r.to_dict() for r in meter.readings],
        "host_inference_j_per_token": (j / tokens) if (j := total(meter.readings) if meter.readings else None) else None,
        "seconds": {"float": plain.seconds, "quantised": quantised.seconds, "simulated": chip.seconds},
        "mode_chip": None,
        "layer_errors": [],
        "sensitivity": [],
        "samples": None,
        "solved": None,
    }
    if asked is not None:
        document["solved"] = solved(cfg, model, plan, asked, profiles, placed)
    if cfg.mode_chip_tokens:
        with bar(cfg, "mode chip", min(tokens, cfg.mode_chip_tokens)) as shown:
            parts = (held_out, cfg.mode_chip_tokens, plain, chip)
            document["mode_chip"] = in_mode_chip(model, plan, *parts, shown)
    texts = {
        "compatibility": report.markdown(),
        "conversion": fenced(document["conversion"]),
        "losses": fenced(losses_text(document)),
        "energy": energy_markdown(energy),
        "break-even": "\n".join(f"- {pair['sentence']}" for pair in document["break_even"]) or "No event was sent.",
        "placement": fenced(str(placed.placement or placed.placement_reason)),
        "config": fenced((out / "config.yaml").read_text(), "yaml"),
    }
    if asked is not None:
        texts["solved"] = solving.markdown(document["solved"])
    write_json(out / "deploy.json", document)  # already here: what follows may take long
    if cfg.layer_tokens:
        say("error of every layer")
        document["layer_errors"] = errors_of_layers(model, plan, evenly(held_out, cfg.layer_tokens))
    if cfg.sensitivity:
        windows = evenly(held_out, cfg.sensitivity_tokens)
        with bar(cfg, "one layer at a time", windows[:, 1:].numel() * (1 + len(plan.segments))) as shown:
            document["sensitivity"] = one_layer_at_a_time(model, plan, windows, shown)
    if cfg.layer_tokens or cfg.sensitivity:
        texts["sensitivity"] = layers_markdown(document["layer_errors"], document["sensitivity"])
    if cfg.generate:
        found = {name: written(cfg, name, m, corpus) for name, m in (("float", model), ("deployed", simulated))}
        document["samples"] = {name: asdict(s) for name, s in found.items()}
        texts["samples"] = samples_markdown(found)
    write_json(out / "deploy.json", document)
    scalars = ("loss_float_nats", "loss_quantised_nats", "loss_simulated_nats", "events_per_token", "synops_per_token")
    with Tracker(out) as tracker:
        tracker.log(1, {f"deploy/{name}": document[name] for name in (*scalars, "synops_fraction")})
        if asked is not None:
            tracker.log(1, {f"deploy/accuracy_{name}": document["solved"][name]["accuracy"] for name in MODELS})
        for name, text in texts.items():
            tracker.text(name, text)
        if placed.placement is not None:
            tracker.figure("core utilisation", chip_figure(placed.placement))
        tracker.figure("spike raster", raster_figure(placed.messages, f"messages on held-out text, {cfg.route} route"))
    write_json(out / "run.json", record | {"status": "finished"})
    width = terminal_width()
    print(compatibility_text(report, width))
    print(in_lines(losses_text(document), width))
    print(in_lines("\n".join(pair["sentence"] for pair in document["break_even"]), width))
    for name in ("sensitivity", "solved"):
        if name in texts:
            print(texts[name])
    if cfg.generate:
        print(texts["samples"])
    return document


def solved(
    cfg: DeployConfig, model: Transformer, plan: Plan, asked: Questions, profiles: Sequence[Profile], placed: Placed
) -> dict[str, Any]:
    """What the three models solve, and what answering takes on the chip."""
    modules = {
        "float": model,
        "quantised": deployed_model(model, plan, backend="quantised"),
        "simulated": deployed_model(model, plan, backend="fixed_point"),
    }
    found = {}
    for name, module in modules.items():
        with Bar(f"answers, {name}", len(asked.asked), "questions", cfg.progress) as shown:
            found[name] = solving.answers(module, asked, shown.advance)
    reader = deployed_model(model, plan, backend="fixed_point")
    tokens = solving.read_once(reader, found["simulated"])
    mapped = [c for c in with_time_steps(reader.counts(), plan) if not c.host]
    energy = [price(mapped, profile, placed) for profile in profiles]
    if plan.chip == "loihi2":
        energy.append(extrapolated(mapped, placed))
    return solving.record(asked, found, energy, tokens)


def measured(cfg: DeployConfig, name: str, model: nn.Module, windows_NT1: Tensor) -> HeldOut:
    """Held-out loss, with a bar on stderr."""
    with bar(cfg, name, windows_NT1[:, 1:].numel()) as shown:
        return held_out_loss(model, windows_NT1, shown)


def written(cfg: DeployConfig, name: str, model: nn.Module, corpus: Corpus) -> Sample:
    """A model's continuation of the prompt."""
    with bar(cfg, f"text, {name}", cfg.generate_tokens) as shown:
        return sample(
            model,
            corpus.tokenizer,
            cfg.generate,
            cfg.generate_tokens,
            temperature=cfg.temperature,
            seed=0,
            advance=shown,
        )


@contextmanager
def bar(cfg: DeployConfig, name: str, tokens: int) -> Iterator[Advance]:
    """A progress bar on stderr over so many tokens."""
    with Bar(name, tokens, "tokens", cfg.progress) as shown:
        yield shown.advance


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(document: Mapping[str, Any]) -> None:
    finish(document, "deploy", file=Path(document["folder"]) / "deploy.json", headline=HEADLINE)


def _tell_module(document: Mapping[str, Any]) -> None:
    print(*lines(document, terminal_width()), sep="\n")
    print(f"all of it: {Path(document['folder']) / PAGE}")
    finish(document, "deploy", file=Path(document["folder"]) / "deploy.json", headline=HEADLINE_OF_MODULE)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate deploy`; see `run_app` for exit codes."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.startswith(("module=", "data=")) for word in words):
        return run_app(
            "deploy_module",
            DeployModuleConfig,
            deploy_module,
            argv,
            expected=EXPECTED_OF_MODULE,
            tell=_tell_module,
            command="deploy",
            configs="configs.modules",
        )
    return run_app("deploy", DeployConfig, deploy, argv, expected=EXPECTED, tell=_tell)


if __name__ == "__main__":
    sys.exit(main())
