"""Sweeps: what a sweep file says, the runs it stands for, and the processes that make them."""
