"""One `convert` for all routes: the configuration's type says which, or else the chip."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hardware.text import quoted
from neuro.analysis.compatibility import CompatibilityReport
from neuro.analysis.preparation import counted_kinds, prepared_copy
from neuro.analysis.spiking.neurons import CONVERTER, LIF
from neuro.conversion import graded, rate, sigma_delta
from neuro.conversion.calibration import Calibration
from neuro.conversion.graded import GradedConfig
from neuro.conversion.plan import Plan
from neuro.conversion.rate import RateConfig
from neuro.conversion.sigma_delta import SigmaDeltaConfig

ROUTES = ("graded", "sigma_delta", "rate")


def convert(
    module: nn.Module,
    calibration: Calibration,
    report: CompatibilityReport,
    config: GradedConfig | SigmaDeltaConfig | RateConfig | None = None,
) -> Plan:
    """Integer graphs of every mapped segment of `module`, which is not changed.

    Layers that the report says can become nn.Linear are converted first, on a copy; the plan's first note says what that
    gained.

    Args:
        module: the module that `report` and `calibration` were made from.
        calibration: ranges of every mapped layer.
        report: names what is mapped, which layers form MLP pairs, and the chip.
        config: a `GradedConfig`, `SigmaDeltaConfig` or `RateConfig` chooses the route; None: the graded route on Loihi 2,
            the rate route on Loihi 1, whose spikes are binary.

    Raises:
        NothingToMap, ValueError: as the route's own `convert`.
        ValueError: the rate route with another route's report of a network that pools.
        ValueError: the graded or the sigma-delta route on Loihi 1; a report of a network of spiking neurons by route "lif".
        TypeError: a configuration of another type.
    """
    if report.layer_by_layer is not None:
        plan = convert(module, calibration, report.layer_by_layer, config)
        kept = f"The neurons stay on the host, and the layers go one by one; {CONVERTER} makes one graph of both."
        return replace(plan, notes=(*plan.notes, kept))
    if report.route == LIF:
        raise ValueError(
            f"the report is of route {quoted(LIF)}, whose neurons and layers become one graph: {CONVERTER} makes it. For "
            "layers one by one, with the neurons on the host, take the report of analyse(module, example, route='graded')"
        )
    if report.preparation is not None and report.preparation.report is not None:
        layers = report.preparation.layers
        plan = convert(prepared_copy(module, layers), calibration, report.preparation.report, config)
        gained = (
            f"Prepared: {counted_kinds(layers)} became nn.Linear on a copy; "
            f"{report.preparation.report.mac_share:.1%} of the MACs "
            f"run on the chip, {report.mac_share:.1%} would without."
        )
        return replace(plan, prepared=tuple(layers), notes=(gained, *plan.notes))
    if config is None and report.chip == "loihi1":
        config = RateConfig()
    if isinstance(config, RateConfig) and any(stage.pool for chain in report.chains for stage in chain.stages):
        raise ValueError(
            f"the report is of route {quoted(report.route)}, where a pooling is part of the layer before; on the rate route"
            " it has neurons of its own. Take the report of analyse(module, example, route='rate')"
        )
    if isinstance(config, RateConfig):
        return rate.convert(module, calibration, report, config)
    if isinstance(config, SigmaDeltaConfig):
        return sigma_delta.convert(module, calibration, report, config)
    if config is not None and not isinstance(config, GradedConfig):
        raise TypeError(
            f"config is {type(config).__name__}; GradedConfig, SigmaDeltaConfig or RateConfig chooses the route"
        )
    if report.chip == "loihi1":
        raise ValueError("loihi1 has binary spikes and takes no graded payloads; pass RateConfig() as config")
    return graded.convert(module, calibration, report, config)
