"""From a graph and its input to what it costs: counts, cores, joules, time and break-even in one record."""
