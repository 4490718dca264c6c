"""A step of reinforcement beside TRL's `GRPOTrainer`: the same model, prompts, outputs and lengths."""

from experiments.benches.reinforcing.command import main

__all__ = ["main"]
