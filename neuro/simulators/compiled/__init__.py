"""The simulator's loops in C: the sources, the folder where the machine's own build of them is kept, and the calls."""
