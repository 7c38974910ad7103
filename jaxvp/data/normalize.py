"""Statistics of action and state dimensions, and the map between SI units and normalised values."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxvp.errors import UserError

MODES = ("min_max", "quantile", "mean_std")
# A dimension with a smaller range, in its own unit, is constant: an arm that is not used.
CONSTANT = 1e-6
# A dimension whose quantiles are closer than this share of its range is nearly constant.
NEARLY_CONSTANT = 0.01
# States are clipped to this many times the range of the data.
STATE_LIMIT = 5.0


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of one column, one number per dimension (A or S of them) in SI units.

    Attributes:
      names: of the dimensions, such as "left_x"; units: such as "m", "" for none.
      count: number of steps that the statistics come from.
      q01, q99: quantiles 0.01 and 0.99.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    count: int
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    def __post_init__(self):
        sizes = {}
        for field in dataclasses.fields(self):
            if field.name != "count":
                value = tuple(getattr(self, field.name))
                object.__setattr__(self, field.name, value)
                sizes[field.name] = len(value)
        if len(set(sizes.values())) != 1:
            raise UserError(f"Statistics must have one entry per dimension each, found {sizes}.")

    def bounds(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 (low, high), the range of the data: minimum and maximum, or in the mode
        "quantile" the quantiles, save where a dimension is nearly constant; low == high for a
        constant dimension."""
        low, high = np.asarray(self.min), np.asarray(self.max)
        if mode == "quantile":
            # Of a gripper that is closed 99 % of the time, noise is all that the quantiles span.
            q01, q99 = np.asarray(self.q01), np.asarray(self.q99)
            spread = q99 - q01 >= np.maximum(CONSTANT, NEARLY_CONSTANT * (high - low))
            low, high = np.where(spread, q01, low), np.where(spread, q99, high)
        return low, np.where(high - low < CONSTANT, low, high)

    def scale(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 (offset, scale): values become (value - offset) / scale, and 0 where the scale is
        0, in a constant dimension."""
        low, high = self.bounds(mode)
        if mode == "mean_std":
            return np.where(high > low, self.mean, low), np.where(high > low, self.std, 0.0)
        return (low + high) / 2, (high - low) / 2


class StatsStream:
    """Statistics of one column whose steps come in parts, in bounded memory.

    The quantiles come from the steps with the smallest keys, a sample that does not depend on the
    order and the size of the parts; everything else comes from all steps.
    """

    def __init__(self, names: Sequence[str], units: Sequence[str], sample: int):
        """`names`, `units`: as in `Stats`; `sample`: how many steps quantiles come from at most."""
        self.names, self.units, self._sample = tuple(names), tuple(units), sample
        self._count = 0
        self._min, self._max = np.full(len(names), np.inf), np.full(len(names), -np.inf)
        self._mean, self._squares = np.zeros(len(names)), np.zeros(len(names))
        self._largest_key = np.iinfo(np.uint64).max
        self._values, self._keys, self._kept = [], [], 0

    def add(self, values: np.ndarray, keys: np.ndarray):
        """Adds steps.

        Args:
          values: float[n, dimensions].
          keys: uint64[n], a random number of each step, always the same for the same step.

        Raises:
          UserError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise UserError(f"Statistics of {self.names} need finite values.")
        if not len(values):
            return
        # Chan, Golub and LeVeque (1979): means and sums of squares of two parts become one's.
        mean, before = values.mean(0, dtype=np.float64), self._count
        self._count += len(values)
        delta = mean - self._mean
        self._mean += delta * (len(values) / self._count)
        self._squares += np.square(values - mean).sum(0)
        self._squares += np.square(delta) * (before * len(values) / self._count)
        self._min = np.minimum(self._min, values.min(0))
        self._max = np.maximum(self._max, values.max(0))
        chosen = keys <= self._largest_key
        if chosen.any():
            self._values.append(values[chosen])
            self._keys.append(keys[chosen])
            self._kept += len(self._keys[-1])
        if self._kept > 1.25 * self._sample:
            self._thin()

    def _thin(self):
        """Keeps the steps of the sample."""
        values, keys = np.concatenate(self._values), np.concatenate(self._keys)
        if len(keys) > self._sample:
            smallest = np.argpartition(keys, self._sample - 1)[: self._sample]
            values, keys = values[smallest], keys[smallest]
            self._largest_key = keys.max()
        self._values, self._keys, self._kept = [values], [keys], len(keys)

    def result(self) -> Stats:
        """The statistics of all steps that were added.

        Raises:
          UserError: no step was added.
        """
        if not self._count:
            raise UserError(f"Statistics of {self.names} need at least one step.")
        self._thin()
        quantiles = [np.quantile(values.astype(np.float64), (0.01, 0.99))
                     for values in self._values[0].T]
        numbers = (self._min, self._max, self._mean, np.sqrt(self._squares / self._count),
                   *np.transpose(quantiles))
        return Stats(self.names, self.units, self._count, *(tuple(n.tolist()) for n in numbers))


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Maps the actions and states of one robot to normalised values and back.

    Attributes:
      action, state: their statistics; None for a column that the data lacks.
      mode: "min_max" maps the range of the data to [-1, 1]; "quantile" the quantiles 0.01 and 0.99,
        or the range of a nearly constant dimension, whose rare moves are outside of the quantiles;
        "mean_std" maps to mean 0 and standard deviation 1.
    """

    action: Stats | None
    state: Stats | None
    mode: str = "min_max"

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"normalization must be one of {MODES}, found {self.mode!r}.")

    def normalize(self, column: str, values: np.ndarray) -> np.ndarray:
        """SI units to normalised values.

        Args:
          column: "action" or "state".
          values: float[..., A] or float[..., S].

        Returns:
          float32 of the same shape. Constant dimensions are 0. Actions are clipped to the range of
          the data, which is [-1, 1] but for the mode "mean_std"; states to STATE_LIMIT times that
          range, around its middle: a policy should see that it is outside of its data, and a joint
          that has always held still should not become thousands.

        Raises:
          UserError: the column has no statistics, or another number of dimensions.
        """
        offset, scale, low, high = self._map(column, values)
        values = np.clip(values, low, high)
        return ((values - offset) / np.where(scale, scale, np.inf)).astype(np.float32)

    def unnormalize(self, column: str, values: np.ndarray) -> np.ndarray:
        """Normalised values to SI units, float32; the inverse of `normalize`, with the same
        arguments and errors.

        Actions are clipped to the range of the data: a policy stays in it.
        """
        offset, scale, low, high = self._map(column, values)
        values = offset + np.asarray(values, np.float64) * scale
        if column == "action":
            values = np.clip(values, low, high)
        return values.astype(np.float32)

    def _map(self, column: str, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """float64 (offset, scale, low, high): of `Stats.scale`, and what values are clipped to, in
        SI units; for a column that must have the dimensions of `values`."""
        stats = getattr(self, column)
        if stats is None:
            raise UserError(f"There are no statistics of {column}: the data has none.")
        if np.shape(values)[-1] != len(stats.names):
            raise UserError(
                f"{column} must have {len(stats.names)} dimensions {stats.names}, "
                f"found shape {np.shape(values)}."
            )
        return self._maps[column]

    @functools.cached_property
    def _maps(self) -> dict[str, tuple[np.ndarray, ...]]:
        result = {}
        for column, times in ("action", 1.0), ("state", STATE_LIMIT):
            if stats := getattr(self, column):
                low, high = stats.bounds(self.mode)
                middle, half = (low + high) / 2, times * (high - low) / 2
                result[column] = *stats.scale(self.mode), middle - half, middle + half
        return result

    def to_dict(self) -> dict:
        """The normalizer as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping) -> "Normalizer":
        """The inverse of `to_dict`.

        Raises:
          KeyError, TypeError, UserError: `values` is not what `to_dict` returns.
        """
        columns = {
            name: Stats(**values[name]) if values[name] else None for name in ("action", "state")
        }
        return cls(**columns, mode=values["mode"])
