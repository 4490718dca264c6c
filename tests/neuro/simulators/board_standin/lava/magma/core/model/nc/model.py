"""Stand-in for Intel's closed Lava-Loihi extension: the name by which Lava knows models for neuro cores."""


class AbstractNcProcessModel:
    """Beside Lava's Python models, so that they run on a CPU."""
