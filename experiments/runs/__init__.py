"""What a run is: its folder, its settings, its deployment, and JSON that every reader accepts."""
