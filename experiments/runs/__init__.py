"""What a run is: its folder, its settings, how it starts, goes on and ends, and what a command prints last."""
