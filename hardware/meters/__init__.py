"""Joules that were measured: NVML, RAPL, Zeus."""
