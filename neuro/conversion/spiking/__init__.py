"""A spiking network in real numbers: its description, how snnTorch modules become one, and its integers on a chip."""
