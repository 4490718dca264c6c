"""The argparse commands of `spikegate`: compat, place, simulate, verify, export, import, doctor, completion."""
