"""What a policy expects to see: the mode that predicts it, and what to compare it with."""

from collections.abc import Mapping

import numpy as np

from jaxvp.data import augment, observation
from jaxvp.errors import UserError
from jaxvp.policy.bundle import Manifest, Mode, function_name, imagines


def mode(manifest: Manifest, where: str) -> Mode:
    """The mode that predicts a video of an observation, and as little else as there is.

    Raises:
      UserError: no mode does; the message names those of the bundle, `where`.
    """
    modes = [mode for mode in manifest.modes if imagines(mode)]
    if not modes:
        names = ", ".join(function_name(mode).removesuffix(".stablehlo")
                          for mode in manifest.modes)
        raise UserError(f"{where} predicts no video of an observation, its modes are {names}: "
                        "export a run whose stages train video.")
    return min(modes, key=lambda mode: len(mode[1]))


def shown(manifest: Manifest, clip: Mapping) -> np.ndarray:
    """uint8[B, T, H', W', 3]: the canvas of a clip or observation as the exported functions see it,
    which is what "video" is to be compared with."""
    crop = manifest.config.get("data", {}).get("crop", 1.0)
    clip = augment.fit(clip, manifest.spec, crop=crop)
    return np.asarray(observation.canvas(
        clip["video"], clip["view_mask"], observation.LAYOUTS[manifest.layout]))
