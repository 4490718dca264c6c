"""What a step is spent on: gates by unit, policies, rates, the gate that decides whether gating pays.

Gates of what a model samples lie with the objective that samples, in `objectives/reinforcement/`: which prompts are sampled
from (`prompts.py`), how many outputs each gets (`outputs.py`), which of their tokens are learnt (`tokens.py`).
"""
