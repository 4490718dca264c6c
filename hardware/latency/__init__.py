"""Events to seconds: published rates and the time of a step."""
