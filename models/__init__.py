"""Pyro programs, one file each: model, guide where it needs one, and what is known exactly about it."""
