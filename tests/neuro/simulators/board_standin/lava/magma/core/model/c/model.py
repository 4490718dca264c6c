"""Stand-in for Intel's closed Lava-Loihi extension: without this class Loihi2HwCfg ends in NameError."""


class CLoihiProcessModel:
    """No model here is one."""
