"""A model of one's own, trained by each arm on one clock: its parts, what ran, what that costs, the loop."""
