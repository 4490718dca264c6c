"""How a run is kept: the files of a checkpoint, where they lie, and a thread that writes them."""
