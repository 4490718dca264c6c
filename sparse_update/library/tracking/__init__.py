"""Which row of a layer is which token of the loss: followed through one forward, never guessed from sizes."""
