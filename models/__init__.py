"""Pyro programs, one file each: the model, its guide where it needs one, and its exact answers."""
