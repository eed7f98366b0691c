"""Scripts to read from top to bottom; each ends with a claim that it checks."""
