"""Experiments with an entry in LOG.md: fewer events, a language model on the chip, digits, pictures, SANA-FE."""
