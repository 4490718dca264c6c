"""Entry points, and how runs are compared and shown: the only floor that knows Hydra and TensorBoard."""
