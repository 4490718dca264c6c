"""Energy profiles as data; read by ``hardware.energy.profile.load_profile``."""
