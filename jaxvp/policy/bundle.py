"""A policy bundle: the folder that a trained policy is evaluated, served and shared as.

    policy.json          `Manifest`: what the policy sees and does, and where it comes from
    params/              weights, written by Orbax
    act.stablehlo        `jax.export` of act(params, observation, keys) -> float32[B, P, A]
    imagine.stablehlo    the same of imagine -> uint8[B, T, H', W', 3]; may be absent
    text_embeddings/     of the texts that the policy knows, when its text is embedded

policy.json lists the SHA-256 of every file and of what it says itself: a bundle that was changed
after its export is refused.

An observation is {video uint8[B, V, 1, H, W, 3], view_mask bool[B, V], text int32[B, M] or
bfloat16[B, M, D], state float32[B, S], state_mask bool[B, S]}, normalised; keys are uint32[B, 2],
the data of one PRNG key per row. Reading a bundle needs no model code, and nothing in it is
unpickled; the functions can only compute, see `policy.program`.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping

import jax
import jax.export
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxvp.config import build
from jaxvp.data.normalize import Normalizer, Stats
from jaxvp.data.observation import LAYOUTS
from jaxvp.errors import UserError, naming, os_error
from jaxvp.files import find
from jaxvp.policy import digests, program

FORMAT_VERSION = 2
# Lies where a bundle is being written; renamed to policy.json when all else is there.
UNFINISHED = "policy.json.incomplete"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What policy.json says.

    Attributes:
      format_version: of the bundle.
      method, stage, step: what was trained, how far, in optimizer steps.
      robot, camera_text: of the unified text, see `observation.describe`.
      layout: a name in `observation.LAYOUTS`, whose V views the policy sees.
      cameras: for each view the camera of an observation that it shows, None for a view that the
        robot lacks.
      image_size: (H, W) of a view as it is observed; what `act` does with it (the central part
        that a policy trained on parts of the picture sees) is inside of `act`.
      image_orientation: "upright", the top row first.
      text_length: M; text_width: D of embedded text, 0 when text is bytes.
      fps: control steps, that is actions, per second; video_fps: frames per second of `imagine`.
      chunk: P; execution_horizon: how many of these actions are executed before the next look.
      batch_size: rows of the exported functions.
      action_size, state_size: A and S of the exported functions, at least the dimensions of
        `action` and `state`; the rest is padding.
      action, state: names, units and statistics of the dimensions; no state: None.
      normalization: see `Normalizer.mode`.
      protocol: keyword arguments of an evaluation suite that follow from how the training data was
        made, such as {"image_size": 128, "rotation": "180"}.
      git_revision, versions, config: of the code, its packages, and the training run.
      files: name to SHA-256 of every other file; sha256: of the rest of policy.json, see `digests`.

    Raises:
      UserError: a value is out of its range.
    """

    format_version: int
    method: str
    stage: str
    step: int
    robot: str
    camera_text: str
    layout: str
    cameras: tuple[str | None, ...]
    image_size: tuple[int, int]
    image_orientation: str
    text_length: int
    fps: float
    video_fps: float
    chunk: int
    execution_horizon: int
    batch_size: int
    action_size: int
    state_size: int
    action: Stats
    state: Stats | None
    normalization: str
    protocol: Mapping
    git_revision: str
    versions: Mapping
    config: Mapping
    files: Mapping[str, str]
    sha256: str
    text_width: int = 0

    def __post_init__(self):
        views = LAYOUTS[self.layout].cameras if self.layout in LAYOUTS else ()
        state_names = self.state.names if self.state else ()
        checks = {
            f"layout is one of {', '.join(LAYOUTS)}": self.layout in LAYOUTS,
            f"cameras has one entry for each of the views {views}":
                len(self.cameras) == len(views) and any(self.cameras),
            "image_orientation is 'upright'": self.image_orientation == "upright",
            "image_size, text_length, fps, video_fps and batch_size are positive": min(
                *self.image_size, self.text_length, self.fps, self.video_fps, self.batch_size) > 0,
            "execution_horizon is in 1..chunk": 1 <= self.execution_horizon <= self.chunk,
            "action_size is at least the number of actions":
                self.action_size >= len(self.action.names) > 0,
            "state_size is at least the number of states": self.state_size >= len(state_names),
        }
        for expected, holds in checks.items():
            if not holds:
                name = expected.split()[0].rstrip(",")
                found = getattr(self, name)
                raise UserError(f"policy.json must have: {expected}; found {name} = {found!r}.")
        _ = self.normalizer

    @functools.cached_property
    def normalizer(self) -> Normalizer:
        """Between SI units and what the exported functions take and give."""
        return Normalizer(self.action, self.state, self.normalization)

    def dimensions(self, column: str) -> tuple[str, ...]:
        """Names with units of "action" or "state", such as "left_x [m]"."""
        stats = getattr(self, column)
        pairs = zip(stats.names, stats.units, strict=True) if stats else ()
        return tuple(f"{name} [{unit}]" if unit else name for name, unit in pairs)


class _Exported:
    """An exported function of a fixed number of rows, compiled for this machine's device."""

    def __init__(self, path: epath.Path, manifest: Manifest):
        self._path, self._manifest = path, manifest
        written = manifest.versions.get("jax", "unknown")
        advice = f"The bundle was written with jax {written}, this is jax {jax.__version__}"
        try:
            self._exported = jax.export.deserialize(bytearray(path.read_bytes()))
        except OSError:
            raise
        except Exception as error:  # Another format shows as any error of the flatbuffers reader.
            raise UserError(
                f"{path} cannot be read ({_line(error)}). {advice}: use that version, or export "
                "again.") from error
        program.check(self._exported, str(path))
        platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
        if platform not in self._exported.platforms:
            raise UserError(
                f"{path} was exported for {', '.join(self._exported.platforms)}, not for "
                f"{platform}: export again with it, or set JAX_PLATFORMS."
            )
        (self.params, *inputs), _ = jax.tree.unflatten(
            self._exported.in_tree,
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self._exported.in_avals],
        )
        expected = (_observation_spec(manifest), _spec(np.uint32, manifest.batch_size, 2))
        if tuple(inputs) != expected:
            raise UserError(f"{path} takes {inputs}, policy.json says {expected}: export again.")

    @functools.cached_property
    def _compiled(self):
        _, observation, keys = jax.tree.unflatten(
            self._exported.in_tree, self._exported.in_avals)[0]
        return jax.jit(self._exported.call).lower(self.params, observation, keys).compile()

    def compile(self):
        """Compiles now, and not upon the first call."""
        _ = self._compiled

    def __call__(self, params, observation: Mapping, keys: np.ndarray) -> np.ndarray:
        """Any number of rows: in groups of `batch_size`, the last one filled with its last row."""
        rows, size = len(keys), self._manifest.batch_size
        results = []
        for start in range(0, rows, size):
            index = np.minimum(np.arange(start, start + size), rows - 1)
            take = functools.partial(np.take, indices=index, axis=0)
            part = jax.tree.map(take, (dict(observation), keys))
            results.append(np.asarray(self._compiled(params, *part)))
        return np.concatenate(results)[:rows]


class Bundle:
    """A loaded policy; `load` makes it.

    Attributes:
      path, manifest, params: where it lies, what it says, its weights on the default device.
    """

    def __init__(self, path: epath.Path, manifest: Manifest, params: dict, act: _Exported):
        self.path, self.manifest, self.params, self._act = path, manifest, params, act

    def act(self, observation: Mapping[str, np.ndarray], keys: np.ndarray) -> np.ndarray:
        """Action chunks, normalised: float32[B, P, A].

        Args:
          observation: as the module says, any B >= 1.
          keys: uint32[B, 2]. A row's actions depend on its key and observation, not on other rows.
        """
        return self._act(self.params, observation, keys)

    def imagine(self, observation: Mapping[str, np.ndarray], keys: np.ndarray) -> np.ndarray:
        """What the policy expects to see, uint8[B, T, H', W', 3]; arguments as for `act`.

        Raises:
          UserError: the bundle was exported without it.
        """
        return self._imagine(self.params, observation, keys)

    @functools.cached_property
    def _imagine(self) -> _Exported:
        if "imagine.stablehlo" not in self.manifest.files:
            raise UserError(f"{self.path} was exported without imagine.stablehlo.")
        return _Exported(self.path / "imagine.stablehlo", self.manifest)


def save(path: epath.PathLike, manifest: Mapping, params: dict, act: bytes,
         imagine: bytes | None = None, text_embeddings: epath.PathLike = ""):
    """Writes a bundle; policy.json comes last, so that a bundle that has it is complete. What a
    writing that failed has left in the folder is removed.

    Args:
      path: the folder; it is made, and holds nothing yet.
      manifest: the fields of `Manifest` as JSON values; format_version, files and sha256 are filled
        in.
      params: nested dict of arrays, in the dtypes of the exported functions.
      act, imagine: `jax.export.Exported.serialize()` of the functions.
      text_embeddings: folder to copy, when the manifest has a text_width.

    Raises:
      UserError: the manifest has an unknown, missing or wrong field.
      UserError: the folder is not empty.
      OSError: a file cannot be written.
    """
    path = epath.Path(path).resolve()
    checked = _checked(manifest, {})
    claim(path)
    try:
        with naming(path / "params"), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "params", params)
        _write(path / "act.stablehlo", act)
        if imagine is not None:
            _write(path / "imagine.stablehlo", imagine)
        if checked.text_width:
            (path / "text_embeddings").mkdir()
            for file in map(epath.Path, find(text_embeddings, "*")):
                with naming(path / "text_embeddings" / file.name):
                    file.copy(path / "text_embeddings" / file.name)
        seal(path, manifest)
    except BaseException:
        with contextlib.suppress(OSError):  # The next one tries again.
            _clear(path)
        raise


def seal(path: epath.PathLike, manifest: Mapping):
    """Writes policy.json for the files that lie in the folder `path`.

    Args:
      path: the folder.
      manifest: as for `save`.

    Raises:
      UserError: the manifest has an unknown, missing or wrong field.
      OSError: it cannot be written.
    """
    path = epath.Path(path).resolve()
    values = dataclasses.asdict(_checked(manifest, digests.of_files(path)))
    values = json.loads(json.dumps(values))  # Tuples are lists in JSON.
    text = json.dumps(values | {"sha256": digests.of_meaning(values)}, indent=2) + "\n"
    _write(path / UNFINISHED, text.encode())
    (path / UNFINISHED).replace(path / "policy.json")


def claim(path: epath.PathLike):
    """Makes the folder of a bundle, and marks it as unfinished; before the work is done that it is
    for. Removes what an export that failed, or was killed, has left there.

    Raises:
      UserError: it is not empty, and holds something else.
      OSError: it is a file, or cannot be written to.
    """
    path = epath.Path(path).resolve()
    if path.exists() and any(path.iterdir()) and not (path / UNFINISHED).exists():
        raise UserError(f"{path} is not empty: remove it, or export to another folder.")
    _clear(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / UNFINISHED).touch()


def _clear(path: epath.Path):
    """Removes what is left of a bundle whose writing failed, all but the mark: TensorStore may
    still be writing."""
    if (path / UNFINISHED).exists():
        for child in path.iterdir():
            if child.name != UNFINISHED:
                child.rmtree() if child.is_dir() else child.unlink()


def _write(path: epath.Path, data: bytes):
    with naming(path):
        path.write_bytes(data)


def _checked(manifest: Mapping, files: Mapping[str, str]) -> Manifest:
    return build(Manifest, {**manifest, "format_version": FORMAT_VERSION, "files": files,
                            "sha256": ""}, "policy.json")


def read_manifest(path: epath.PathLike) -> Manifest:
    """The manifest of the bundle in the folder `path`; touches no weights and no device.

    Raises:
      UserError: there is no bundle.
      UserError: policy.json is damaged, was changed after its export, or has another format.
    """
    file = epath.Path(path) / "policy.json"
    if not file.exists():
        raise UserError(
            f"{path} is not a policy bundle: it has no policy.json. `python -m jaxvp.export` makes "
            "a bundle of a training run."
        )
    try:
        values = json.loads(file.read_text())
        version = values["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error!r}): export the bundle again.") from error
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise UserError(
            f"{file} has format_version {version!r}, this jaxvp reads {FORMAT_VERSION}: "
            + ("upgrade jaxvp." if newer else "export the bundle again with this version."))
    if values.get("sha256") != digests.of_meaning(values):
        raise UserError(
            f"{file} was changed after its export: it says the SHA-256 {values.get('sha256')!r}, "
            f"its content has {digests.of_meaning(values)!r}. Copy or export the bundle again.")
    return build(Manifest, values, str(file))


def load(path: epath.PathLike) -> Bundle:
    """Reads a bundle, puts its weights on the default device and compiles `act`.

    Raises:
      UserError: there is no bundle, or a part of it is missing or damaged.
      UserError: a part is of another format, for another platform, does more than compute (see
        `policy.program`), or does not fit the others.
    """
    path = epath.Path(path).resolve()
    manifest = read_manifest(path)
    digests.check_files(path, manifest.files)
    act = _Exported(path / "act.stablehlo", manifest)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), act.params)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", target)
    except (ValueError, KeyError, TypeError) as error:
        if os_error(error):  # Of TensorStore.
            raise
        raise UserError(f"{path / 'params'} does not hold the weights of act.stablehlo: "
                        f"{_line(error)}") from error
    act.compile()
    return Bundle(path, manifest, params, act)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _spec(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _observation_spec(manifest: Manifest) -> dict[str, jax.ShapeDtypeStruct]:
    batch, views = manifest.batch_size, len(manifest.cameras)
    return {
        "video": _spec(np.uint8, batch, views, 1, *manifest.image_size, 3),
        "view_mask": _spec(np.bool_, batch, views),
        "text": _spec(ml_dtypes.bfloat16, batch, manifest.text_length, manifest.text_width)
                if manifest.text_width else _spec(np.int32, batch, manifest.text_length),
        "state": _spec(np.float32, batch, manifest.state_size),
        "state_mask": _spec(np.bool_, batch, manifest.state_size),
    }
