"""A model that grows while it is trained: fewer blocks at first, all of them for the rest of the budget."""
