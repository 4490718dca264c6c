"""Chips of fixed pools as data; read by ``hardware.chips.pooled.load_pooled``."""
