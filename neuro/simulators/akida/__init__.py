"""BrainChip's Akida 2.0: its makers' simulator and mapper in a process of their own."""
