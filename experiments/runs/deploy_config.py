"""The settings of one deployment; what Hydra composes from `configs/deploy.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hardware.text import short
from neuro.conversion.calibration import DEFAULT_PERCENTILE, METHODS
from neuro.conversion.graded import GradedConfig
from neuro.conversion.rate import RateConfig
from neuro.conversion.routes import ROUTES
from neuro.conversion.sigma_delta import SigmaDeltaConfig

CHIP_PROFILES = ["loihi1_davies2018", "loihi1_sanafe"]
DIGITAL_PROFILES = ["digital45_int8_sram", "digital45_int8_dram", "digital45_fp32_sram"]


@dataclass
class RouteConfig:
    """How a model is converted and priced, whatever it is."""

    ROUTES: ClassVar[tuple[str, ...]] = ROUTES

    chip: str = "loihi2"
    chips: int = 0
    """Chips there are; 0: as many as it takes."""
    route: str = "graded"
    """graded | sigma_delta | rate"""
    conversion: GradedConfig = field(default_factory=GradedConfig)
    """Settings of the graded route."""
    sigma_delta: SigmaDeltaConfig = field(default_factory=SigmaDeltaConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    calibration_method: str = "percentile"
    """percentile | mse: how inputs are clipped."""
    percentile: float = DEFAULT_PERCENTILE
    profiles: list[str] = field(default_factory=lambda: [*CHIP_PROFILES, *DIGITAL_PROFILES])
    """Names of energy profiles, or paths of profile files."""
    threads: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_least(self, 0, "chips", "threads")
        if self.route not in self.ROUTES:
            raise ValueError(f"route is {short(self.route)!r}; it is one of {', '.join(self.ROUTES)}")
        if self.calibration_method not in METHODS:
            raise ValueError(f"calibration_method is {short(self.calibration_method)!r}; it is one of {', '.join(METHODS)}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it lies above 0 and up to 100")

    @property
    def settings(self) -> GradedConfig | SigmaDeltaConfig | RateConfig:
        """The chosen route's."""
        if self.route == "rate":
            return self.rate
        return self.sigma_delta if self.route == "sigma_delta" else self.conversion


@dataclass
class DeployConfig(RouteConfig):
    """One deployment of one trained run."""

    run: str = "???"
    """Folder of the training run."""
    out: str = ""
    """Folder of the deployment; empty: RUN/deploy."""
    calibration_tokens: int = 8192
    """Training tokens that set the ranges."""
    eval_tokens: int = 32768
    """Held-out tokens for the three losses and the counts; the same ones for all."""
    layer_tokens: int = 2048
    """Of these, tokens for the error of every layer; 0: none."""
    mode_chip_tokens: int = 4096
    """Of these, tokens for the loss in the simulator's mode "chip", after published emulators; 0: none."""
    sensitivity: bool = False
    """Also the loss with one layer at a time converted."""
    sensitivity_tokens: int = 8192
    questions: int = 256
    """Of a run on tasks: held-out questions of each family that the float, the quantised and the simulated model answer."""
    generate: str = ""
    """A prompt: the float and the deployed model continue it."""
    generate_tokens: int = 100
    temperature: float = 0.0
    """Of the text; 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "calibration_tokens", "eval_tokens", "sensitivity_tokens", "generate_tokens", "questions")
        check_least(self, 0, "layer_tokens", "mode_chip_tokens", "temperature")


def check_least(settings: object, least: int, *names: str) -> None:
    """Raise ValueError for the first of the settings that is below `least`."""
    for name in names:
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
