"""What `bench gate` measures: steps of every kind, and the matrix products of a step with nothing around them."""
