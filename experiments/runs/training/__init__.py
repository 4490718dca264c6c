"""A training run from its settings to its record: configuration, table of component times, the run, what is said of it."""
