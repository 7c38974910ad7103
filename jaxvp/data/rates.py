"""Comparisons of rates and durations, with a tolerance.

Records keep a rate as float32, a video's is measured, and people write 29.97 for 30000/1001: what
differs by less than TOLERANCE is the same. 30 and 29.97, 1e-3 apart, are not.
"""

import numpy as np

TOLERANCE = 1e-4  # As a share.


def same(one: float, other: float) -> bool:
    """Whether two positive rates, or two durations, are the same."""
    return abs(one - other) <= TOLERANCE * max(one, other)


def at_least(value: float | np.ndarray, wanted: float) -> bool | np.ndarray:
    """Whether rates, or durations, are `wanted` or more; an array for an array."""
    return value >= wanted * (1 - TOLERANCE)
