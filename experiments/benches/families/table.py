"""One row for each family: the share of its multiply-accumulates on the chip, the error of its answer, host crossings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benches.families.models import FAMILIES, Family
from neuro.analysis.compatibility import CompatibilityReport, NothingToMap, analyse
from neuro.analysis.preparation import prepare
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig
from neuro.conversion.rate import RateConfig
from neuro.conversion.routes import convert
from neuro.conversion.sigma_delta import SigmaDeltaConfig
from neuro.conversion.spiking.convert import convert_spiking
from neuro.conversion.spiking.describing import describe
from neuro.deployment.deployed import deploy

ROUTES: dict[str, GradedConfig | SigmaDeltaConfig | RateConfig] = {
    "graded": GradedConfig(),
    "sigma_delta": SigmaDeltaConfig(),
    "rate": RateConfig(64),
}
SLACK = 1e-6  # of a share that is recorded with six digits


def prepared(family: Family) -> nn.Module:
    """The model with every layer that can be an nn.Linear as one, as `convert` does it."""
    return prepare(family.model, family.held_out)


def analysed(family: Family, model: nn.Module, route: str = "graded") -> CompatibilityReport:
    """Verdicts of a prepared family; of one of which nothing maps, too. Spiking networks are analysed step by step."""
    if family.route == "lif":
        return analyse(model, family.held_out["input"][:, 0], route="lif", strict=False)
    return analyse(model, family.held_out, route=route, strict=False)


def row(name: str, route: str = "graded") -> dict[str, Any]:
    """Measure one family: `mapped_mac_share`; `relative_rms_error` of the answer against the float model on inputs that
    set no range, None where nothing maps; crossings to and from the host for each row and sample, and what a row is.
    """
    family = FAMILIES[name]()
    model = prepared(family)
    report = analysed(family, model, route)
    samples = len(next(iter(family.held_out.values())))  # of spiking networks, each of one step
    found: dict[str, Any] = {
        "family": name,
        "model": type(family.model).__name__,
        "route": family.route if family.route == "lif" else route,
        "unit": family.unit,
        "mapped_mac_share": round(report.mac_share, 6),
        "macs_per_sample": report.macs_per_token * report.tokens / samples,
        "crossings_per_sample": report.crossings_per_token * report.tokens / samples,
        "crossings_per_row": report.crossings_per_token,
        "rows_per_sample": report.tokens / samples,
        "host": host_kinds(report),
        "relative_rms_error": None,
        "why": "",
    }
    if family.route == "lif":
        return found | {"relative_rms_error": spiking_error(family)}
    try:
        plan = convert(model, calibrate(model, [family.calibration]), report, ROUTES[route])
    except (NothingToMap, ValueError) as error:
        return found | {"why": str(error)}
    with torch.no_grad():
        wanted = answer(model(**family.held_out))
    got = answer(deploy(model, plan)(**family.held_out))
    return found | {"relative_rms_error": relative(got, wanted)}


def spiking_error(family: Family) -> float:
    """Error of how often each neuron spikes in a sample, against the module's own run from rest, step by step."""
    x_BTF = family.held_out["input"]
    for layer in family.model.children():
        reset = getattr(layer, "reset_mem", None)
        if callable(reset):
            reset()
    with torch.no_grad():
        wanted_BTN = torch.stack([answer(family.model(x_BF)) for x_BF in x_BTF.unbind(1)], dim=1)
    network = convert_spiking(describe(family.model), steps=x_BTF.shape[1], calibration=family.calibration["input"])
    (got_BTN,) = network.run(x_BTF)[0].values()
    return relative(got_BTN.sum(dim=1), wanted_BTN.double().sum(dim=1))


def host_kinds(report: CompatibilityReport) -> dict[str, float]:
    """Kind of operation -> its share of all multiply-accumulates, of what stays on the host; the largest first."""
    sums: dict[str, float] = {}
    for operation in report.operations:
        if operation.runs_on == "host" and operation.macs_per_token:
            sums[operation.kind] = sums.get(operation.kind, 0.0) + operation.macs_per_token
    total = report.macs_per_token or 1.0
    return {kind: round(macs / total, 6) for kind, macs in sorted(sums.items(), key=lambda pair: -pair[1])}


def answer(out: Any) -> Tensor:
    """The first tensor of what a model returns."""
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found.detach()


def relative(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the wanted answer about its mean."""
    return math.sqrt(float((got - wanted).double().square().mean() / (wanted - wanted.mean()).double().square().mean()))


def slipped(recorded: Collection[Mapping[str, Any]], shares: Mapping[str, float]) -> list[str]:
    """A sentence for each family whose mapped share lies below the recorded one, or that is not there any more."""
    found = []
    for one in recorded:
        name, was = str(one["family"]), float(one["mapped_mac_share"])
        if name not in shares:
            found.append(f"{name} is recorded and not measured")
        elif shares[name] < was - SLACK:
            found.append(f"{name}: {shares[name]:.6f} of the multiply-accumulates are mapped, {was:.6f} are recorded")
    return found


def table(rows: Collection[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    head = "| family | class | route | a sample | mapped MACs | error against float | host crossings: a row | a sample |"
    lines = [f"{head} stays on the host |", "|---|---|---|---|---|---|---|---|---|"]
    for one in rows:
        error = "-" if one["relative_rms_error"] is None else f"{one['relative_rms_error']:.2%}"
        host = ", ".join(f"{kind} {share:.1%}" for kind, share in list(one["host"].items())[:2]) or "-"
        rows = one["rows_per_sample"]
        what = f"{rows:g} {one['unit']}" + ("" if rows == 1 else "es" if one["unit"].endswith("ch") else "s")
        lines.append(
            f"| {one['family']} | {one['model']} | {one['route']} | {what} | {one['mapped_mac_share']:.1%} | {error} | "
            f"{one['crossings_per_row']:,.4g} | {one['crossings_per_sample']:,.4g} | {host} |"
        )
    return lines
