"""A spiking network in real numbers to the integers of SynSense's Xylo."""
