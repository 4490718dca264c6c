"""More compute at inference in the place of parameters: accuracy against counted inference FLOPs, for sizes and rules."""

from experiments.studies.inference.command import main

__all__ = ["main"]
