"""What of a module can move to the chip: tracing, rules, verdicts per operation."""
