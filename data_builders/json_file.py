"""JSON files of a download."""

import json
from pathlib import Path

from jaxvp.errors import UserError


def read(path: Path):
    """What a JSON file holds.

    Raises:
      OSError: it is not there.
      UserError: it is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
