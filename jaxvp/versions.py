"""Which software made something: results and checkpoints say it."""

import importlib.metadata
import platform

import jaxvp


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, jaxvp and `packages`, without those that are not installed."""
    found = {"python": platform.python_version(), "jaxvp": jaxvp.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
