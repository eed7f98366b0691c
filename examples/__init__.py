"""Scripts that a user reads top to bottom; each ends in a claim that it checks."""
