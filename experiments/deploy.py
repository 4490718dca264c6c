"""Put a trained run on the simulated chip: `python -m experiments.deploy run=RUN`, or `spikegate deploy ...`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from experiments.hydra_app import ConfigError, run_app
from experiments.plain_json import write_json
from experiments.runs import RunError, new_record, read_json
from experiments.tracking import Tracker
from hardware.energy import Counts, EnergyReport, account, load_profile
from hardware.meters import Meter, total
from neuro.calibration import calibrate
from neuro.compatibility import NothingToMap, analyse
from neuro.conversion.graded import GradedConfig, convert
from neuro.conversion.plan import save_plan
from neuro.deployed import deploy as deployed_model
from sparse_update.checkpoint import CheckpointError, load_checkpoint
from sparse_update.data.corpus import Corpus, DataConfig, load_corpus
from sparse_update.data.regimes import held_out as held_out_sets
from sparse_update.data.regimes import make_stream
from sparse_update.data.sources import CorpusError
from sparse_update.data.stream import WindowStream
from sparse_update.trainer import evaluate
from sparse_update.transformer import ModelConfig, Transformer

EXPECTED = (RunError, CorpusError, CheckpointError, NothingToMap)
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
    conversion: GradedConfig = field(default_factory=GradedConfig)
    calibration_tokens: int = 8192
    """Training tokens that set the ranges."""
    eval_tokens: int = 32768
    """Held-out tokens for the three losses and the counts; the same ones for all."""
    profiles: list[str] = field(default_factory=lambda: [*CHIP_PROFILES, *DIGITAL_PROFILES])
    """Names of energy profiles, or paths of profile files."""
    threads: int = 0

    def __post_init__(self) -> None:
        if self.calibration_tokens < 1 or self.eval_tokens < 1:
            raise ValueError("calibration_tokens and eval_tokens must be at least 1")


def load_run(folder: Path) -> tuple[Transformer, Corpus, DataConfig, dict[str, Any]]:
    """(model in eval mode, its corpus, what was trained on, run.json) of a finished training run.

    Raises RunError for a folder that is no finished run, or whose corpus has changed since.
    """
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
    write_json(out / "run.json", record)
    (out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))

    say(f"calibrating on {cfg.calibration_tokens:,} training tokens")
    seed = trained["seed"]
    stream = WindowStream(corpus, context, seed) if data.regime == "plain" else make_stream(corpus, data, context, seed)
    training = stream.take(max(1, cfg.calibration_tokens // context)).tokens[:, :-1]
    report = analyse(model, training[:1], cfg.chip)
    plan = convert(model, calibrate(model, training.split(16)), report, cfg.conversion)
    save_plan(plan, out / "plan")

    held_out = held_out_sets(corpus, data, context, cfg.eval_tokens)["val"]  # the set that the run was judged by
    say(f"evaluating on {held_out[:, 1:].numel():,} held-out tokens: float, quantised, simulated")
    seconds: dict[str, float] = {}
    with Meter() as meter:
        loss_float = timed(seconds, "float", model, held_out)
    loss_quantised = timed(seconds, "quantised", deployed_model(model, plan, backend="quantised"), held_out)
    simulated = deployed_model(model, plan, backend="fixed_point")
    simulated.reset_counts()
    loss_simulated = timed(seconds, "simulated", simulated, held_out)
    counts, health = simulated.counts(), simulated.health()
    tokens = held_out[:, 1:].numel()

    mapped = [c for c in counts if not c.host]
    energy = [account(mapped, load_profile(name)) for name in cfg.profiles]  # every profile prices the same layers
    host_macs = report.macs_per_token - sum(c.dense_macs for c in mapped) / tokens
    host = f"host share: {host_macs:,.0f} of {report.macs_per_token:,.0f} MACs per token run on the host, in no row here"
    document = {
        "folder": str(out),
        "run": str(run),
        "stream": trained["stream"],
        "arm": trained["arm"],
        "seed": trained["seed"],
        "chip": cfg.chip,
        "ran_on": "simulated (ours, lava)",
        "loss_float_nats": loss_float,
        "loss_quantised_nats": loss_quantised,
        "loss_simulated_nats": loss_simulated,
        "val_tokens": tokens,
        "mapped_mac_share": report.mac_share,
        "mapped_parameter_share": report.parameter_share,
        "macs_per_token": report.macs_per_token,
        "mapped_macs_per_token": sum(c.dense_macs for c in mapped) / tokens,
        "events_per_token": sum(c.events for c in mapped) / tokens,
        "synops_per_token": sum(c.synops for c in mapped) / tokens,
        "neuron_updates_per_token": sum(c.neuron_updates_active + c.neuron_updates_inactive for c in mapped) / tokens,
        "max_payload_bits": max(c.payload_bits for c in mapped),
        "clipped_inputs": sum(h.clipped_inputs for h in health),
        "saturations": sum(h.wide + h.payload_overflows for h in health),
        "wraps": sum(h.wraps for h in health),
        "layers": [layer_record(c, tokens) for c in counts],
        "compatibility": report.table(),
        "conversion": plan.table(),
        "energy": [per_token(e, host) for e in energy],
        "host_inference_energy": [r.to_dict() for r in meter.readings],
        "host_inference_j_per_token": (j / tokens) if (j := total(meter.readings) if meter.readings else None) else None,
        "seconds": seconds,
    }
    write_json(out / "deploy.json", document)
    with Tracker(out) as tracker:
        tracker.log(
            1,
            {
                "deploy/loss_float_nats": loss_float,
                "deploy/loss_quantised_nats": loss_quantised,
                "deploy/loss_simulated_nats": loss_simulated,
                "deploy/events_per_token": document["events_per_token"],
                "deploy/synops_per_token": document["synops_per_token"],
            },
        )
        tracker.text("compatibility", f"```\n{document['compatibility']}\n```")
        tracker.text("conversion", f"```\n{document['conversion']}\n```")
        tracker.text("energy", energy_markdown(energy))
    write_json(out / "run.json", record | {"status": "finished"})
    print(document["compatibility"])
    return document


def timed(seconds: dict[str, float], name: str, model: nn.Module, windows_NT1: torch.Tensor) -> float:
    """Held-out loss in nats per token; the wall seconds go into `seconds`."""
    start = time.perf_counter()
    loss = evaluate(model, windows_NT1)
    seconds[name] = time.perf_counter() - start
    return loss


def layer_record(counts: Counts, tokens: int) -> dict[str, Any]:
    """One layer's counts per token."""
    totals = ("synops", "events", "neuron_updates_active", "neuron_updates_inactive", "dense_macs")
    raw = asdict(counts)
    rest = {key: value for key, value in raw.items() if key not in totals and key != "tokens"}
    return rest | {f"{key}_per_token": raw[key] / tokens for key in totals}


def per_token(report: EnergyReport, missing: str) -> dict[str, Any]:
    """An energy report with its joules, total and by term, divided by its tokens; `missing` joins what is not known."""
    whole = report.to_dict()
    whole |= {"unknown": [*whole["unknown"], missing], "lower_bound": True, "scope": "layers on the chip"}
    scaled = {key: whole[key] / report.tokens for key in ("low_j", "mid_j", "high_j")}
    terms = {term: [value / report.tokens for value in triple] for term, triple in report.by_term().items()}
    return whole | scaled | {"per": "token", "terms": terms}


def energy_markdown(reports: Sequence[EnergyReport]) -> str:
    """Where each joule comes from, as a Markdown table."""
    rows = ["| profile | term | low nJ/token | mid | high | source |", "|---|---|---|---|---|---|"]
    for report in reports:
        for term, values in report.by_term().items():
            cells = " | ".join(f"{1e9 * v / report.tokens:,.1f}" for v in values)
            rows.append(f"| {report.profile} | {term} | {cells} | {report.source} |")
        rows += [f"| {report.profile} | not known | - | - | - | {reason} |" for reason in report.unknown]
        rows += [f"| {report.profile} | label | - | - | - | {label} |" for label in report.labels]
    return "\n".join(rows)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate deploy`; see `run_app` for exit codes."""
    return run_app("deploy", DeployConfig, deploy, argv, expected=EXPECTED)


if __name__ == "__main__":
    sys.exit(main())
