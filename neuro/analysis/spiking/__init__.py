"""Networks of spiking neurons: which layers are neurons, what becomes of them, and the report of route "lif"."""
