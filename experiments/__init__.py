"""Entry points, TensorBoard, statistics: the floor that knows Hydra and puts the rooms below together."""
