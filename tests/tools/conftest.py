"""The datasets of tests/data."""

from data.conftest import dataset, make_dataset  # noqa: F401
