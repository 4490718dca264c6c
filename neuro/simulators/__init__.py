"""Simulators of a `SpikingGraph`: our own integer one (`fixed_point`) and Lava in a worker process (`lava_client`)."""
