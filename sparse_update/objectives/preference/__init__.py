"""Preferences: pairs of answers, reward models learned from them, and what happens when a policy is trained by those."""
