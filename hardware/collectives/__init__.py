"""Data: constants of collective operations as NCCL publishes them; read by ``hardware.clusters.collectives``."""
