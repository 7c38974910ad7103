"""Demonstrations in the embedded tabletop environment."""
