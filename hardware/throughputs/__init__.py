"""Data: published tables of training throughput; read by ``hardware.clusters.published``."""
