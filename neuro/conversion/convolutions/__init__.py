"""Convolutions, poolings and residual adds as one graph: geometry, stages, and a builder for each route."""
