"""Torch modules that a network may be made of: event thresholds, spiking layers, attention written out."""
