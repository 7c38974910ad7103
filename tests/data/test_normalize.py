"""Statistics and the map to [-1, 1]."""

import json

import numpy as np
import pytest

from jaxvp.data.normalize import Normalizer, Stats


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 3.0, (500, 4))
    values[:, 2] = 0.7  # An arm that does not move.
    values[:, 3] = rng.random(500) > 0.995  # A gripper that opens in few steps.
    return values


def stats(values):
    names = [f"d{i}" for i in range(values.shape[1])]
    return Stats.of(values, names, [""] * len(names))


def test_statistics_are_those_of_numpy(values):
    found = stats(values)
    assert found.count == 500
    np.testing.assert_allclose(found.mean, values.mean(0))
    np.testing.assert_allclose(found.std, values.std(0))
    np.testing.assert_allclose(found.q01, np.quantile(values, 0.01, axis=0))
    np.testing.assert_allclose(found.q99, np.quantile(values, 0.99, axis=0))


@pytest.mark.parametrize("column", ["action", "state"])
def test_min_max_maps_the_range_and_back(values, column):
    normalizer = Normalizer(stats(values), stats(values), "min_max")
    normal = normalizer.normalize(column, values)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.min(0), [-1, -1, 0, -1], atol=1e-6)
    np.testing.assert_allclose(normal.max(0), [1, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(normalizer.unnormalize(column, normal), values, atol=1e-5)


def test_quantiles_clip_actions_but_not_states(values):
    normalizer = Normalizer(stats(values), stats(values), "quantile")
    low, high = np.quantile(values[:, 0], (0.01, 0.99))
    inside = (values[:, 0] >= low) & (values[:, 0] <= high)
    action = normalizer.normalize("action", values)
    assert np.abs(action).max() == 1 and (np.abs(action[inside, 0]) <= 1).all()
    assert np.abs(normalizer.normalize("state", values)).max() > 1
    back = normalizer.unnormalize("action", action)
    np.testing.assert_allclose(back[inside, 0], values[inside, 0], atol=1e-5)


def test_quantiles_keep_a_dimension_that_rarely_moves(values):
    normalizer = Normalizer(stats(values), None, "quantile")
    assert set(np.unique(normalizer.normalize("action", values)[:, 3])) == {-1, 1}


def test_unnormalized_actions_stay_in_the_data(values):
    normalizer = Normalizer(stats(values), None, "min_max")
    found = normalizer.unnormalize("action", np.full(4, 7.0))
    np.testing.assert_allclose(found, values.max(0), rtol=1e-6)


def test_json_round_trip_and_digest(values):
    normalizer = Normalizer(stats(values), None, "min_max")
    copy = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    assert copy == normalizer and copy.digest() == normalizer.digest()
    assert Normalizer(stats(values + 1e-3), None).digest() != normalizer.digest()
    assert Normalizer(stats(values), None, "quantile").digest() != normalizer.digest()


def test_errors_say_what_is_wrong(values):
    normalizer = Normalizer(stats(values), None)
    with pytest.raises(ValueError, match="no statistics of state"):
        normalizer.normalize("state", values)
    with pytest.raises(ValueError, match=r"4 dimensions .* found shape \(7,\)"):
        normalizer.unnormalize("action", np.zeros(7))
    with pytest.raises(ValueError, match="must be one of .*'minmax'"):
        Normalizer(None, None, "minmax")
    with pytest.raises(ValueError, match="finite"):
        stats(np.full((3, 1), np.nan))
