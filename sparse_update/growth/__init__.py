"""What changes while a model is trained: how many blocks it has, and how many tokens a position is made of."""
