"""What the rest of jaxvp knows of a method."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax

from jaxvp.data.spec import ClipSpec, Window
from jaxvp.errors import UserError, did_you_mean

REGISTRY = {
    "fast_wam": "jaxvp.methods.fast_wam:FastWAM",
    "vidar": "jaxvp.methods.vidar:Vidar",
    "video_policy": "jaxvp.methods.video_policy:VideoPolicy",
    "vpp": "jaxvp.methods.vpp:VPP",
}

Mode = tuple[tuple[str, ...], tuple[str, ...]]  # (given, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run of a method.

    Attributes:
      trains: parts of the parameters that are trained.
      reads: parts that exist too and are not trained.
      window: what a clip of this stage shows; the method's spec covers it.
      future_every: in training batches, rows 0, n, 2n, ... show the frames after now, and are of
        all records; in the others these frames are masked and not even read, and all of them have
        actions.
    """

    trains: tuple[str, ...]
    reads: tuple[str, ...] = ()
    window: Window
    future_every: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that exist in this stage."""
        return self.trains + self.reads


@dataclasses.dataclass(frozen=True)
class Extra:
    """An array that can be computed once for every clip and stored with the data.

    Attributes:
      shape: of one clip's array; parts: of the parameters that it is computed with.
      compute: (params, clip) -> float32[B, *shape], of a clip's video, view_mask and frame_mask.
      identity: what it depends on, apart from clip and parameters, JSON values.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    compute: Callable
    identity: Mapping


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)  # Hashable by identity: jit's static.
class Method:
    """A published system, as the fields of `config.method`.

    `params` is {part: nested dict of arrays} of the parts that there are; `keys` is one PRNG key a
    row of a batch, so that a row's loss and result do not depend on the batch that it is computed
    in. Leaves whose name has a component "statistics" (running means of batch normalisation) are
    never trained: `loss` returns their new values.

    Attributes:
      spec: the arrays of clips and observations; its window covers the windows of all stages.
      layout: a name in `observation.LAYOUTS`.
      stages: name to Stage.
      modes: what `predict` can be asked for, (given, wanted): such as (("observation",),
        ("action",)). "observation" stands for the arrays of `spec.observation`.
      sharding_rules: ordered (regex of a parameter's name, partition spec).
    """

    spec: ClipSpec
    layout: str

    modes: ClassVar[tuple[Mode, ...]]
    sharding_rules: ClassVar[tuple] = ()

    @property
    def stages(self) -> Mapping[str, Stage]:
        raise NotImplementedError

    @functools.cached_property
    def video_models(self) -> Mapping:
        """Part of the parameters to the `VideoModel` that it is of; may be empty."""
        return {}

    @property
    def extras(self) -> Mapping[str, Extra]:
        """What can be stored with the data, by name."""
        return {}

    def init(self, part: str, key: jax.Array) -> dict:
        """Parameters of a part, float32; {} where it has none."""
        raise NotImplementedError

    def load(self, part: str, path: str, abstract: dict) -> tuple[dict, object]:
        """Published weights of a part, which `abstract` has the shapes and places of, and a report
        of what was found.

        Raises:
          UserError: there are none of this part, or they do not fit.
        """
        raise UserError(f"config.init_from.{part}: there are no published weights of it, only "
                        "workdirs and bundles.")

    def loss(self, params: dict, clip: dict, keys: jax.Array, stage: str, train: bool
             ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """Loss and metrics, means over the batch; and new statistics.

        Args:
          params: of the parts of the stage.
          clip: the arrays of `spec`, with the window of the stage.
          keys: one a row.
          stage: a name in `stages`.
          train: whether text, state and the like are hidden from the network at random, and
            statistics come from the batch.

        Returns:
          Scalar, {name: scalar}, and the leaves named "statistics" of the parts that the stage
          trains with their new values, nested like `params`; no leaves without `train`. Parts that
          the stage only reads keep theirs: they are used as without `train`.
        """
        raise NotImplementedError

    def predict(self, params: dict, given: dict, keys: jax.Array, wanted: tuple[str, ...],
                carry: dict) -> tuple[dict, dict]:
        """What the method expects, from one draw.

        Args:
          params: of the parts that this needs.
          given: the arrays of an observation, and what else the mode gives, arrays of a whole clip
            such as "action".
          keys: one a row.
          wanted: of one of `modes`: "action", float32[B, P, A], normalised; "video", uint8[B, T,
            H', W', 3], the canvas from the first observed frame on.
          carry: what the call before returned; `initial_carry` at the start of an episode.

        Returns:
          {name: array} of what is wanted, and the next carry.
        """
        raise NotImplementedError

    def initial_carry(self, batch: int) -> dict:
        """What `predict` remembers in a closed loop, at its start: nested dict of arrays
        [batch, ...], all of them zeros, which is what the reader of a bundle makes of their
        shapes. `predict` returns a carry of the same shapes in every mode."""
        return {}

    def render(self, params: dict, clip: dict) -> jax.Array:
        """uint8[B, T, H', W', 3]: the canvas of a clip, what "video" is to be compared with."""
        raise UserError(f"{type(self).__name__} has no pictures to show.")


def get(name: str) -> type[Method]:
    """The method class called `name`, in REGISTRY or as "module:Class".

    Raises:
      UserError: there is none; suggests the nearest.
    """
    place = REGISTRY.get(name, name if ":" in name else None)
    if place is None:
        raise UserError(f"config.method.name={name!r} does not exist."
                        f"{did_you_mean(name, REGISTRY)} There are: {', '.join(sorted(REGISTRY))}.")
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # The module is there, what it imports is not.
        raise UserError(f"config.method.name={name!r}: there is no module {module}.") from error
    if found is None:
        raise UserError(f"config.method.name={name!r}: {module} has no {attribute}.")
    return found


def split_keys(keys: jax.Array, number: int) -> jax.Array:
    """Keys [number, B] from one key a row."""
    return jax.vmap(lambda key: jax.random.split(key, number), out_axes=1)(keys)


def normal_rows(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise float32[B, *shape], each row from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def bernoulli_rows(keys: jax.Array, rate: float) -> jax.Array:
    """bool[B, 1]: which rows to hide something of, at `rate`."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, rate, (1,)))(keys)
