"""Settings of commands on a torch module of one's own whose keys bear the names of groups, kept apart from those groups."""
