"""Statistics of action and state dimensions, and the map between SI units and [-1, 1]."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxvp.errors import UserError

MODES = ("min_max", "quantile")
# A dimension that moves less than this, in its own unit, is constant: an arm that is not used.
CONSTANT = 1e-6


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of one column, one number per dimension (A or S of them) in SI units.

    Attributes:
      names: the dimensions, such as "left_x"; units: theirs, such as "m", "" for none.
      count: number of steps they come from.
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

    @classmethod
    def of(cls, values: np.ndarray, names: Sequence[str], units: Sequence[str]) -> "Stats":
        """Statistics of float[count, dimensions].

        Raises:
          UserError: there are no values, or one is not finite.
        """
        values = np.asarray(values, np.float64)
        if not len(values) or not np.isfinite(values).all():
            raise UserError(f"Statistics of {names} need finite values, found {values.shape}.")
        q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
        numbers = (values.min(0), values.max(0), values.mean(0), values.std(0), q01, q99)
        return cls(tuple(names), tuple(units), len(values), *(tuple(n.tolist()) for n in numbers))

    def bounds(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 (low, high) that map to -1 and 1; low == high for a constant dimension."""
        low, high = np.asarray(self.min), np.asarray(self.max)
        if mode == "quantile":
            # A gripper that is closed 99 % of the time has no spread between quantiles, but a task.
            q01, q99 = np.asarray(self.q01), np.asarray(self.q99)
            spread = q99 - q01 >= CONSTANT
            low, high = np.where(spread, q01, low), np.where(spread, q99, high)
        return low, np.where(high - low < CONSTANT, low, high)


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Maps the actions and states of one robot to [-1, 1] and back.

    Attributes:
      action, state: their statistics; None for a column that the data lacks.
      mode: "min_max" maps the range to [-1, 1], "quantile" the quantiles 0.01 and 0.99.
    """

    action: Stats | None
    state: Stats | None
    mode: str = "min_max"

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"normalization must be one of {MODES}, found {self.mode!r}.")

    def _bounds(self, column: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stats = getattr(self, column)
        if stats is None:
            raise UserError(f"There are no statistics of {column}: the data has none.")
        if np.shape(values)[-1] != len(stats.names):
            raise UserError(
                f"{column} must have {len(stats.names)} dimensions {stats.names}, "
                f"found shape {np.shape(values)}."
            )
        return stats.bounds(self.mode)

    def normalize(self, column: str, values: np.ndarray) -> np.ndarray:
        """SI units to [-1, 1].

        Args:
          column: "action" or "state".
          values: float[..., A] or float[..., S].

        Returns:
          float32 of the same shape. Constant dimensions are 0. Actions are clipped to [-1, 1];
          states are not, since a policy should see that it is outside of its data.

        Raises:
          UserError: the column has no statistics, or another number of dimensions.
        """
        low, high = self._bounds(column, values)
        span = np.where(high > low, high - low, 1.0)
        result = np.where(high > low, 2.0 * (values - low) / span - 1.0, 0.0)
        return (np.clip(result, -1, 1) if column == "action" else result).astype(np.float32)

    def unnormalize(self, column: str, values: np.ndarray) -> np.ndarray:
        """[-1, 1] to SI units, float32; the inverse of `normalize`, with the same arguments.

        Actions are clipped to [-1, 1] first: a policy stays in the range of its data.
        """
        low, high = self._bounds(column, values)
        values = np.clip(values, -1, 1) if column == "action" else np.asarray(values)
        return (low + (values.astype(np.float64) + 1.0) / 2.0 * (high - low)).astype(np.float32)

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

    def digest(self) -> str:
        """16 hexadecimal digits that differ for any other statistics or mode."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
