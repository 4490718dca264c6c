"""Published thresholds below which spiking networks pay, as data; read by ``hardware.energy.breakeven``."""
