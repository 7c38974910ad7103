"""Rates that came through float32, or are written in another way, are the same."""

import numpy as np
import pytest

from jaxvp.data import rates


@pytest.mark.parametrize(("one", "other", "same"), [
    (10.0, 10.00001, True), (30000 / 1001, 29.97, True), (float(np.float32(2.4)), 2.4, True),
    (30.0, 29.97, False), (10.0, 10.01, False)])
def test_a_tolerance(one, other, same):
    assert rates.same(one, other) == rates.same(other, one) == same
    assert rates.at_least(min(one, other), max(one, other)) == same
