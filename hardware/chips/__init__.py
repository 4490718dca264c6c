"""Chip limits as data; read by ``hardware.chips.chip.load_chip``."""
