"""What a step is spent on: gates by unit, policies, rates, the auto gate."""
