"""Static power by cores in use, as data; read by ``hardware.energy.static_power``."""
