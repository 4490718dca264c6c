"""Chip limits as data; read by ``hardware.chip.load_chip``."""
