"""Simulators of integer graphs: our own integer one (`fixed_point`) and Lava in a worker process (`lava_client`)."""
