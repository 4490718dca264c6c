"""Settings of published methods, found by Hydra beside our own: `gate=infobatch`, `subset=badam`."""
