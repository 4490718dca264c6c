"""Times per operation as data; read by ``hardware.timing.load_rates``."""
