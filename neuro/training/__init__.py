"""Training for the chip: event thresholds in the loop, an event budget, pruning, 8-bit arithmetic, distillation."""
