"""Demonstrations beside the main one: `spikegate demo NAME`."""
