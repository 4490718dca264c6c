"""Put a trained run on the simulated chip: `python -m experiments.deploy run=RUN`, or `spikegate deploy ...`.

`route` chooses the conversion; its settings are under `conversion` (graded), `sigma_delta` and `rate`. Losses of the float
model, of its quantised twin and of the simulated chip are over the same held-out tokens; intervals are 95 % t-intervals
over windows, of differences paired.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

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
from experiments.runs.folder import RunError, new_record, read_json
from experiments.runs.gated import restore
from experiments.runs.hydra_app import ConfigError, run_app
from experiments.runs.placed import extrapolated, host_energy, price, put_on_cores, thresholds, with_time_steps
from experiments.runs.plain_json import write_json
from experiments.views.chip_figure import chip_figure
from experiments.views.rasters import raster_figure
from experiments.views.tracking import Tracker
from hardware.datafile import DataFileError
from hardware.energy.account import load_profile
from hardware.meters.meter import Meter, total
from hardware.placement import DoesNotFit
from neuro.analysis.compatibility import CompatibilityReport, NothingToMap, analyse
from neuro.conversion.calibration import DEFAULT_PERCENTILE, METHODS, calibrate
from neuro.conversion.graded import GradedConfig
from neuro.conversion.plan import Plan, save_plan
from neuro.conversion.rate import RateConfig
from neuro.conversion.routes import ROUTES, convert
from neuro.conversion.sigma_delta import SigmaDeltaConfig
from neuro.deployment.deployed import deploy as deployed_model
from sparse_update.data.corpus import DataConfig, load_corpus
from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.regimes import held_out as held_out_sets
from sparse_update.data.regimes import make_stream
from sparse_update.data.stream import WindowStream
from sparse_update.loop.checkpoint import CheckpointError, load_checkpoint
from sparse_update.transformer import ModelConfig, Transformer

__all__ = ["DeployConfig", "deploy", "layer_record", "load_run", "main"]

EXPECTED = (RunError, CorpusError, CheckpointError, NothingToMap, DoesNotFit, DataFileError)
PLACING_TOKENS = 256  # held-out tokens whose messages are measured neuron by neuron
CHIP_PROFILES = ["loihi1_davies2018", "loihi1_sanafe"]
DIGITAL_PROFILES = ["digital45_int8_sram", "digital45_int8_dram", "digital45_fp32_sram"]


@dataclass
class DeployConfig:
    """One deployment of one trained run."""

    run: str = "???"
    """Folder of the training run."""
    out: str = ""
    """Folder of the deployment; empty: RUN/deploy."""
    chip: str = "loihi2"
    chips: int = 0
    """Chips there are; 0: as many as it takes."""
    route: str = "graded"
    """graded | sigma_delta | rate"""
    conversion: GradedConfig = field(default_factory=GradedConfig)
    """Settings of the graded route."""
    sigma_delta: SigmaDeltaConfig = field(default_factory=SigmaDeltaConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    calibration_tokens: int = 8192
    """Training tokens that set the ranges."""
    calibration_method: str = "percentile"
    """percentile | mse: how inputs are clipped."""
    percentile: float = DEFAULT_PERCENTILE
    eval_tokens: int = 32768
    """Held-out tokens for the three losses and the counts; the same ones for all."""
    layer_tokens: int = 2048
    """Of these, tokens for the error of every layer; 0: none."""
    mode_chip_tokens: int = 4096
    """Of these, tokens for the loss in the simulator's mode "chip", after published emulators; 0: none."""
    sensitivity: bool = False
    """Also the loss with one layer at a time converted."""
    sensitivity_tokens: int = 8192
    generate: str = ""
    """A prompt: the float and the deployed model continue it."""
    generate_tokens: int = 100
    temperature: float = 0.0
    """Of the text; 0 takes the likeliest token."""
    profiles: list[str] = field(default_factory=lambda: [*CHIP_PROFILES, *DIGITAL_PROFILES])
    """Names of energy profiles, or paths of profile files."""
    threads: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "eval_tokens", "sensitivity_tokens", "generate_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("chips", "layer_tokens", "mode_chip_tokens", "threads", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.route not in ROUTES:
            raise ValueError(f"route is {self.route!r}; it is one of {', '.join(ROUTES)}")
        if self.calibration_method not in METHODS:
            raise ValueError(f"calibration_method is {self.calibration_method!r}; it is one of {', '.join(METHODS)}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it lies above 0 and up to 100")

    @property
    def settings(self) -> GradedConfig | SigmaDeltaConfig | RateConfig:
        """The chosen route's."""
        if self.route == "rate":
            return self.rate
        return self.sigma_delta if self.route == "sigma_delta" else self.conversion


def load_run(folder: Path) -> tuple[Transformer, Corpus, DataConfig, dict[str, Any]]:
    """(model in eval mode, its corpus, what was trained on, run.json) of a finished training run.

    A point of the activity study is one too: the corpus and the record of its run, the arm's name and the seed its own.
    Raises RunError for a folder that is no finished run, or whose corpus has changed since.
    """
    if (folder / "point.json").exists():
        return load_point(folder)
    record = read_json(folder / "run.json")
    if record.get("kind") != "train":
        raise RunError(f"{folder} is a {record.get('kind')} run: name the folder of a training run")
    if record.get("status") != "finished":
        raise RunError(f"{folder}: the run is {record.get('status')}, not finished: resume it first (resume=true)")
    checkpoint = load_checkpoint(folder / "checkpoint")
    data = DataConfig(**checkpoint.meta["config"]["data"])
    corpus = load_corpus(data)
    if corpus.sha256 != checkpoint.meta["corpus_sha256"]:
        raise RunError(
            f"{folder}: its corpus had sha256 {checkpoint.meta['corpus_sha256']}, the one read now has {corpus.sha256}: "
            "held-out loss would not be comparable"
        )
    model = Transformer(ModelConfig(**checkpoint.meta["model"]))
    model.load_state_dict(checkpoint.model)
    return model.eval(), corpus, data, record


def load_point(folder: Path) -> tuple[Transformer, Corpus, DataConfig, dict[str, Any]]:
    """`load_run` of a point of `experiments.studies.activity`: its model with the gates that it was trained with.

    Raises RunError where the point is not finished or its run is gone.
    """
    record = read_json(folder / "point.json")
    run = Path(record["settings"]["run"])
    if not (run / "run.json").exists():
        raise RunError(f"{folder} is a point of the run {run}, which is not there: call from the folder it was made from")
    model, corpus, data, trained = load_run(run)
    restore(model, folder / "checkpoint")
    return model.eval(), corpus, data, trained | {"arm": record["name"], "seed": record["seed"]}


def calibration_windows(cfg: DeployConfig, corpus: Corpus, data: DataConfig, context: int, seed: int) -> Tensor:
    """Inputs of the first training windows of a seed, int64 (N, T)."""
    stream = WindowStream(corpus, context, seed) if data.regime == "plain" else make_stream(corpus, data, context, seed)
    return stream.take(max(1, cfg.calibration_tokens // context)).tokens[:, :-1]


def converted(cfg: DeployConfig, model: Transformer, training_NT: Tensor) -> tuple[CompatibilityReport, Plan]:
    """Verdicts and integer graphs of a model, its ranges from training windows int64 (N, T).

    Raises RunError, with what `neuro` says, for a model or text that cannot be converted; NothingToMap; DoesNotFit.
    """
    try:
        report = analyse(model, training_NT[:1], cfg.chip, route=cfg.route, chips=cfg.chips or None)
        ranges = calibrate(model, training_NT.split(16), percentile=cfg.percentile, method=cfg.calibration_method)
        return report, convert(model, ranges, report, cfg.settings)
    except EXPECTED:
        raise
    except ValueError as error:
        raise RunError(f"{cfg.run} cannot be converted: {error}") from error


def deploy(cfg: DeployConfig) -> dict[str, Any]:
    """Convert, simulate, count and price one run; returns its record, the content of `deploy.json`."""
    run = Path(cfg.run)
    out = Path(cfg.out) if cfg.out else run / "deploy"
    if (out / "run.json").exists():
        raise ConfigError(f"{out} already holds a deployment: choose another folder with out=FOLDER")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for name in cfg.profiles:  # a wrong name is said before the work, not after
        load_profile(name)
    model, corpus, data, trained = load_run(run)
    context = model.cfg.context
    record = new_record("deploy", stream=trained["stream"], arm=trained["arm"], seed=trained["seed"], run=str(run))

    say(f"calibrating on {cfg.calibration_tokens:,} training tokens; {cfg.route} route")
    report, plan = converted(cfg, model, calibration_windows(cfg, corpus, data, context, trained["seed"]))
    write_json(out / "run.json", record)
    (out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
    save_plan(plan, out / "plan")

    held_out = held_out_sets(corpus, data, context, cfg.eval_tokens)["val"]  # the set that the run was judged by
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
    }
    if cfg.mode_chip_tokens:
        with bar(cfg, "mode chip", min(tokens, cfg.mode_chip_tokens)) as shown:
            parts = (held_out, cfg.mode_chip_tokens, plain, chip)
            document["mode_chip"] = in_mode_chip(model, plan, *parts, shown)
    texts = {
        "compatibility": report.markdown(),
        "conversion": f"```\n{document['conversion']}\n```",
        "losses": f"```\n{losses_text(document)}\n```",
        "energy": energy_markdown(energy),
        "break-even": "\n".join(f"- {pair['sentence']}" for pair in document["break_even"]) or "No event was sent.",
        "placement": f"```\n{placed.placement or placed.placement_reason}\n```",
        "config": f"```yaml\n{(out / 'config.yaml').read_text()}\n```",
    }
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
        for name, text in texts.items():
            tracker.text(name, text)
        if placed.placement is not None:
            tracker.figure("core utilisation", chip_figure(placed.placement))
        tracker.figure("spike raster", raster_figure(placed.messages, f"messages on held-out text, {cfg.route} route"))
    write_json(out / "run.json", record | {"status": "finished"})
    print(document["compatibility"])
    print(losses_text(document))
    print(*(pair["sentence"] for pair in document["break_even"]), sep="\n")
    if "sensitivity" in texts:
        print(texts["sensitivity"])
    if cfg.generate:
        print(texts["samples"])
    return document


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
    from tqdm import tqdm

    with tqdm(total=tokens, desc=name, unit=" tokens", unit_scale=True, mininterval=2.0, disable=not cfg.progress) as shown:
        yield shown.update


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate deploy`; see `run_app` for exit codes."""
    return run_app("deploy", DeployConfig, deploy, argv, expected=EXPECTED)


if __name__ == "__main__":
    sys.exit(main())
