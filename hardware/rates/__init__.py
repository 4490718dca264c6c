"""Times per operation as data; read by ``hardware.latency.rates.load_rates``."""
