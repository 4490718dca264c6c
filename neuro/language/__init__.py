"""A language model whose state is native to the chip: its spiking and graded building blocks."""

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
