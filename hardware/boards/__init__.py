"""What stands before a neuromorphic board: probes and their reports."""
