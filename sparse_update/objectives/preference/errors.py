"""What goes wrong with preferences, each with a type of its own."""

from __future__ import annotations


class PreferenceError(ValueError):
    """Pairs, settings or scores that no reward can be learned from or judged by."""


class VocabularyMismatch(PreferenceError):
    """A reward model that reads other tokens than the policy writes."""
