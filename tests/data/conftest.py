"""Datasets to read, see synthetic.py."""

from pathlib import Path

import pytest
from synthetic import write


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """The dataset with its default options; tests do not change it."""
    return write(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture
def make_dataset(tmp_path):
    """make_dataset(name, **options of Synthetic) -> version folder, which the test may damage."""
    return lambda name, **options: write(tmp_path / name, **options)
