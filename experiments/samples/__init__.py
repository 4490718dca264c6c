"""Samples for a deployment: arrays of one's own, digits, Fashion-MNIST, Mackey-Glass, each checked before it is used."""
