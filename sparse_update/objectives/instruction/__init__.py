"""Instruction tuning: the likelihood of answers, given the questions."""
