"""Data: shapes of published decoder Transformers; read by ``hardware.clusters.shapes``."""
