"""The smaller commands of `spikegate`: compat, place, simulate, verify, export, import, doctor, completion."""
