"""Spiking and graded building blocks whose state is native to the chip, and a language model made of them."""

from neuro.language.blocks import GatedMixer, GradedMLP, ShortConvolution, SpikingMixer, SpikingMLP
from neuro.language.grid import use_grid
from neuro.language.model import LanguageConfig, SpikingLanguageModel

__all__ = [
    "GatedMixer",
    "GradedMLP",
    "LanguageConfig",
    "ShortConvolution",
    "SpikingLanguageModel",
    "SpikingMLP",
    "SpikingMixer",
    "use_grid",
]
