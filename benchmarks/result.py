"""What the benchmarks share: where something was measured, and how a result is shown and kept."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path


def hardware() -> str:
    """The processor, as the system names it, and its cores."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores, {platform.machine()}"


def save(result: Mapping, path: Path | None):
    """Prints a result, one line an entry, and writes it to a JSON file, if one is named."""
    for name, value in result.items():
        print(f"{name:28} {value}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
