"""Published networks with measured power or time as data; read by ``hardware.energy.measured_networks``."""
