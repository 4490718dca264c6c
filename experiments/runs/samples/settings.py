"""The settings of a deployment of any module; what Hydra composes from `configs/deploy_module.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.runs.deploy_config import RouteConfig, check_least
from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.reference import check_module
from experiments.runs.samples.spiking import LIF, LifConfig
from experiments.samples.sets import NAMES
from hardware.text import short
from neuro.conversion.routes import ROUTES

READOUTS = ("mean", "sum", "last", "max")


@dataclass
class DeployModuleConfig(RouteConfig):
    """One deployment of any torch module on any samples: `spikegate deploy module=PACKAGE:FUNCTION data=NAME`."""

    ROUTES: ClassVar[tuple[str, ...]] = (*ROUTES, LIF)

    module: str = ""
    """PACKAGE:FUNCTION: an importable module (also from the working directory) and a function in it that returns a trained
    torch module, or with `weights` one of the same shape."""
    weights: str = ""
    """A .safetensors file of the module's state; empty: the function returns it trained."""
    data: str = "arrays"
    """arrays | events | digits | fashion_mnist | mackey_glass"""
    path: str = ""
    """arrays: the .npz file with x, y and perhaps x_train, y_train. events: the one with t, x, y, polarity, recording and
    label. fashion_mnist: a folder with its idx files."""
    scale: float = 0.0
    """arrays: x becomes float and is multiplied by it; 0: floats as they are, whole numbers are token numbers."""
    step_us: float = 0.0
    """events: microseconds of one time step."""
    steps: int = 0
    """events: time steps of a recording."""
    sensor: list[int] = field(default_factory=lambda: [0, 0])
    """events: columns and rows of the sensor, [WIDTH,HEIGHT]."""
    flat: bool = False
    """events: one flat row for each step, (N, T, 2 x width x height), in place of pictures (N, T, 2, height, width)."""
    out: str = ""
    """Folder of the deployment; empty: runs/deploy/FUNCTION-DATA-ROUTE."""
    seed: int = 0
    """Of the data (split of digits, history of Mackey-Glass); a function that trains has seeds of its own."""
    calibration_samples: int = 256
    """Training samples that set the ranges."""
    eval_samples: int = 0
    """Held-out samples to judge by, spread evenly; 0: all."""
    placing_samples: int = 16
    """Of these, samples whose messages are measured neuron by neuron."""
    batch: int = 64
    """Samples in one call. The sigma-delta route reads the rows of a call as a stream."""
    lif: LifConfig = field(default_factory=LifConfig)
    """Settings of `route=lif`, for networks of snnTorch's neurons."""
    readout: str = ""
    """mean | sum | last | max, over the axis of steps, where the module answers at every step and the data once."""
    step_axis: int = 1
    """Axis of steps in what such a module returns: 1 for (N, T, ...), 0 for snnTorch's (T, N, ...)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_module(self.module, "a trained torch module")
        check_least(self, 1, "calibration_samples", "placing_samples", "batch")
        check_least(self, 0, "eval_samples", "scale", "step_us", "steps")
        if len(self.sensor) != 2 or min(self.sensor) < 0:
            raise ConfigError(f"sensor is {short(self.sensor)}; columns and rows, such as [34,34], are needed")
        if self.data not in NAMES:
            raise ConfigError(f"data is {short(self.data)}; it is one of {', '.join(NAMES)}")
        if self.readout not in ("", *READOUTS):
            raise ConfigError(f"readout is {short(self.readout)}; it is one of {', '.join(READOUTS)}, or empty")
        if self.step_axis not in (0, 1):
            raise ConfigError(f"step_axis is {self.step_axis}; steps are the first axis, 0, or the second, 1")
        if self.weights and not self.weights.endswith(".safetensors"):
            raise ConfigError(
                f"weights = {short(self.weights)}: a .safetensors file is read and nothing else, since a pickle can run "
                "code; safetensors.torch.save_model(module, path) writes one"
            )

    @property
    def settings(self) -> Any:
        return self.lif if self.route == LIF else super().settings

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        function = self.module.partition(":")[2]
        return Path(self.out) if self.out else Path("runs/deploy") / f"{function}-{self.data}-{self.route}"
