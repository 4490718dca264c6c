"""Energy profiles as data; read by ``hardware.profile.load_profile``."""
