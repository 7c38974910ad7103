"""What the rest of jaxvp knows of a method."""

import difflib
import importlib
from typing import Protocol

import jax

from jaxvp.data.clips import ClipSpec
from jaxvp.errors import UserError

REGISTRY = {"video_policy": ("jaxvp.methods.video_policy", "VideoPolicy")}


class Method(Protocol):
    """A published system. `clip` is the dict of DESIGN's Clip, `params` a nested dict.

    An observation is a Clip with one frame and no action keys; `keys` is one PRNG key a row, so
    that a row's loss and result do not depend on the batch that they are computed in. Clips whose
    latents are stored have `latents`, float16[B, t, h, w, c], in place of video and view_mask.
    """

    spec: ClipSpec
    layout: str
    stages: tuple[str, ...]
    policy_stages: tuple[str, ...]  # Those that train what `act` needs: others give no policy.
    sharding_rules: tuple  # Ordered (regex of a parameter's name, partition spec).

    def init(self, key: jax.Array) -> dict:
        """All parameters, float32."""

    def load(self, part: str, path: str, abstract: dict) -> tuple[dict, object]:
        """Pretrained weights of `params[part]`, which `abstract` has the shapes and places of, and
        a report of what was found.

        Raises UserError for a part of which there are none.
        """

    def frozen(self, stage: str) -> tuple[str, ...]:
        """Regexes of the parameter paths that this stage does not train."""

    def loss(self, params: dict, clip: dict, keys: jax.Array,
             stage: str) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and scalar metrics, means over the batch."""

    def shown(self, params: dict, clip: dict) -> jax.Array:
        """uint8[B, T, H', W', 3]: the canvas of a clip, what `imagine` is to be compared with."""

    def imagine(self, params: dict, observation: dict, keys: jax.Array) -> jax.Array:
        """uint8[B, T, H', W', 3]: the canvas as the method expects it to go on, frame 0 first."""

    def act(self, params: dict, observation: dict, keys: jax.Array) -> jax.Array:
        """float32[B, P, A]: a normalised action chunk."""


def get(name: str) -> type:
    """The method class called `name`; ValueError with a suggestion when there is none."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(str(name), REGISTRY, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config.method.name={name!r}: known methods {sorted(REGISTRY)}{hint}")
    module, attribute = REGISTRY[name]
    return getattr(importlib.import_module(module), attribute)
