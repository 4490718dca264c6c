"""Joules that were measured, and ratios of times: NVML, RAPL, Zeus, clocks."""
