"""Reinforcement: sample many outputs, score them, push up what was better than its group.

Estimators are weights of tokens (`surrogate.py`). Gates choose prompts before anything is generated (`prompts.py`), outputs
a prompt (`outputs.py`) and tokens (`tokens.py`).
"""
