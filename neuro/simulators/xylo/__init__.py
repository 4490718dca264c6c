"""Xylo in a simulation: the arithmetic of its neurons, and its makers' simulator in a process of its own."""
