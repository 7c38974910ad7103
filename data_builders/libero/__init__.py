"""LIBERO: 130 tasks of a simulated Panda arm."""
