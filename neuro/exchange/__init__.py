"""Graphs in the file formats of other tools; address events as frames."""
