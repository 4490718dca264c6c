"""Float layers to integer spiking graphs. `graded` is the default route."""
