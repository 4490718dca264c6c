"""Sampling in C: the same outputs for the same row, whatever else is computed; built on first use (`hardware.building`)."""
