"""A policy bundle: the folder that a trained policy is evaluated, served and shared as.

    policy.json                     `Manifest`: what the policy sees and does, where it comes from
    params/                         weights, written by Orbax
    observation-action.stablehlo    one exported function (`jax.export`) for each mode of the
    observation-video.stablehlo     method: named by what it is given and what it predicts
    text_embeddings/                of the texts that the policy knows, when its text is embedded

policy.json lists the SHA-256 of every file and of what it says itself: a bundle that was changed
after its export is refused.

A function is (params, given, keys, carry) -> (outputs, carry). `given` has the arrays [B, ...] of
`given_arrays`, normalised; keys are uint32[B, 2], the data of one PRNG key per row; `carry` has
arrays [B, ...] that the method remembers from one call to the next, zeros in the first. The outputs
are {"action": float32[B, P, A], normalised; "video": uint8[B, T, H', W', 3]; ...}. Reading a bundle
needs no model code, and nothing in it is unpickled; the functions can only compute, see
`policy.program`.
"""

import contextlib
import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxvp.config import build
from jaxvp.data import rates
from jaxvp.data.normalize import Normalizer, Stats
from jaxvp.data.observation import LAYOUTS, describe
from jaxvp.data.spec import Arrays, ClipSpec
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError, naming, os_error
from jaxvp.files import find
from jaxvp.policy import digests, program

FORMAT_VERSION = 3
# Marks a folder where a bundle is being written; renamed to policy.json when all else is there.
UNFINISHED = "policy.json.incomplete"

Mode = tuple[tuple[str, ...], tuple[str, ...]]  # (given, wanted), as in `methods.base`.


def function_name(mode: Mode) -> str:
    """The file of a mode's function, such as "observation-action+video.stablehlo"."""
    return "-".join("+".join(names) for names in mode) + ".stablehlo"


def given_arrays(spec: ClipSpec, given: Sequence[str]) -> Arrays:
    """Shapes, without B, and dtypes of what a mode is given: "observation" stands for the arrays of
    an observation, every other name for the array of a whole clip."""
    observation = spec.observation if "observation" in given else {}
    return observation | {name: spec.arrays[name] for name in given if name != "observation"}


def acts(mode: Mode) -> bool:
    """Whether a mode is a policy: it predicts an action of an observation alone."""
    given, wanted = mode
    return given == ("observation",) and "action" in wanted


def imagines(mode: Mode) -> bool:
    """Whether a mode predicts a video of an observation alone."""
    given, wanted = mode
    return given == ("observation",) and "video" in wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What policy.json says.

    Attributes:
      format_version: of the bundle.
      method, stage, step: what was trained ("video+action": the stages of merged workdirs), how
        far, in optimizer steps of the first of them.
      robot, camera_text: of the unified text, see `observation.describe`.
      layout: a name in `observation.LAYOUTS`, whose V views the policy sees.
      cameras: for each view the camera of an observation that it shows, None for a view that the
        robot lacks.
      image_orientation: "upright", the top row first.
      spec: the arrays of an observation and what the window around it shows. Views have the size in
        which they are observed; what a function does with them (it shows a policy that was trained
        on parts of the picture the central part) is inside of the function.
      modes: what the exported functions are given and predict.
      fps: control steps, that is actions, per second.
      execution_horizon: how many of the P actions of a chunk are executed before the next look.
      batch_size: rows of the exported functions.
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
    image_orientation: str
    spec: ClipSpec
    modes: tuple[Mode, ...]
    fps: float
    execution_horizon: int
    batch_size: int
    action: Stats
    state: Stats | None
    normalization: str
    protocol: Mapping
    git_revision: str
    versions: Mapping
    config: Mapping
    files: Mapping[str, str]
    sha256: str

    def __post_init__(self):
        views = LAYOUTS[self.layout].cameras if self.layout in LAYOUTS else ()
        state_names, spec = self.state.names if self.state else (), self.spec
        arrays = {"observation", *spec.arrays}
        checks = {
            f"layout is one of {', '.join(LAYOUTS)}": self.layout in LAYOUTS,
            f"cameras has one entry for each of the views {views}":
                len(self.cameras) == len(views) and any(self.cameras),
            f"spec.cameras is {views}": spec.cameras == views,
            "image_orientation is 'upright'": self.image_orientation == "upright",
            "batch_size is positive": self.batch_size > 0,
            f"fps is at least that of the window, {spec.window.fps}":
                rates.at_least(self.fps, spec.window.fps),
            f"execution_horizon is in 1..{spec.window.chunk}":
                1 <= self.execution_horizon <= spec.window.chunk,
            "spec.action_size is at least the number of actions":
                spec.action_size >= len(self.action.names) > 0,
            "spec.state_size is at least the number of states":
                spec.state_size >= len(state_names),
            "modes gives observations and arrays of clips":
                all(arrays.issuperset(given) for given, _ in self.modes),
            "modes has one that predicts an action of an observation": any(map(acts, self.modes)),
        }
        for expected, holds in checks.items():
            if not holds:
                name = expected.split()[0]
                found = operator.attrgetter(name)(self)
                raise UserError(f"policy.json must have: {expected}; found {name} = {found!r}.")
        _ = self.normalizer

    @functools.cached_property
    def normalizer(self) -> Normalizer:
        """Between SI units and what the exported functions take and give."""
        return Normalizer(self.action, self.state, self.normalization)

    @property
    def acting(self) -> Mode:
        """The mode that a policy acts by: of those that can, the one that predicts the least."""
        return min(filter(acts, self.modes), key=lambda mode: len(mode[1]))

    def dimensions(self, column: str) -> tuple[str, ...]:
        """Names with units of "action" or "state", such as "left_x [m]"."""
        stats = getattr(self, column)
        pairs = zip(stats.names, stats.units, strict=True) if stats else ()
        return tuple(f"{name} [{unit}]" if unit else name for name, unit in pairs)


class _Exported:
    """The exported function of a mode, compiled for this machine's device.

    Attributes:
      params, carry: what it takes, as trees of jax.ShapeDtypeStruct.
    """

    def __init__(self, folder: epath.Path, manifest: Manifest, mode: Mode):
        path, self._batch_size = folder / function_name(mode), manifest.batch_size
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
        self._check(path, manifest, mode)

    def _check(self, path: epath.Path, manifest: Manifest, mode: Mode):
        """Makes sure that the function takes and gives what policy.json says."""
        rows = manifest.batch_size
        given = {name: _spec(dtype, rows, *shape)
                 for name, (shape, dtype) in given_arrays(manifest.spec, mode[0]).items()}
        expected, (found, _) = (given, _spec(np.uint32, rows, 2)), self._arguments
        if len(found) != 4 or tuple(found[1:3]) != expected:
            raise UserError(
                f"{path} takes {found[1:]}, policy.json says {expected}: export again.")
        self.params, _, _, self.carry = found
        result = jax.tree.unflatten(self._exported.out_tree, _specs(self._exported.out_avals))
        outputs, carry = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        chunk = manifest.spec.window.chunk, manifest.spec.action_size
        action = {"action": _spec(np.float32, rows, *chunk)} if "action" in mode[1] else {}
        if not (isinstance(outputs, dict) and outputs.keys() == set(mode[1])
                and outputs | action == outputs and carry == self.carry
                and all(x.shape[:1] == (rows,) for x in jax.tree.leaves((outputs, carry)))):
            raise UserError(f"{path} gives {result}, policy.json says {mode[1]} of {rows} rows, "
                            f"{action}, and the carry that it takes, {self.carry}: export again.")

    @property
    def _arguments(self) -> tuple[tuple, dict]:
        return jax.tree.unflatten(self._exported.in_tree, _specs(self._exported.in_avals))

    @functools.cached_property
    def _compiled(self):
        return jax.jit(self._exported.call).lower(*self._arguments[0]).compile()

    def compile(self):
        """Compiles now, and not upon the first call."""
        _ = self._compiled

    def __call__(self, params, given: Mapping, keys: np.ndarray, carry) -> tuple[dict, dict]:
        """Any number of rows: in groups of `batch_size`, the last one filled with its last row."""
        rows, size = len(keys), self._batch_size
        results = []
        for start in range(0, rows, size):
            index = np.minimum(np.arange(start, start + size), rows - 1)
            part = jax.tree.map(operator.itemgetter(index), (dict(given), keys, carry))
            results.append(self._compiled(params, *part))
        outputs, carries = zip(*results, strict=True)
        # The carry stays on the device: it may be large, and only the next call reads it.
        return (jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *outputs),
                jax.tree.map(lambda *parts: jnp.concatenate(parts)[:rows], *carries))


class Bundle:
    """A loaded policy; `load` makes it.

    Attributes:
      path, manifest, params: its folder, what policy.json says, its weights on the default device.
    """

    def __init__(self, path: epath.Path, manifest: Manifest, params: dict, acting: _Exported):
        self.path, self.manifest, self.params, self._acting = path, manifest, params, acting
        self._functions = {manifest.acting: acting}

    def predict(self, given: Mapping[str, np.ndarray], keys: np.ndarray, wanted: Sequence[str],
                carry: dict) -> tuple[dict[str, np.ndarray], dict]:
        """What the policy expects, from one draw.

        Args:
          given: arrays [B, ...] as the module says, any B >= 1; with `wanted` they choose the mode.
          keys: uint32[B, 2]. A row's results depend on its own key, given and carry, not on other
            rows.
          wanted: names of the outputs, in any order.
          carry: what the call before returned for these rows, or `initial_carry`.

        Returns:
          {name: array [B, ...]} of what is wanted, and the next carry, arrays on the device.

        Raises:
          UserError: no mode predicts just this of arrays of these shapes, or its function is
            damaged.
        """
        mode = self._mode(given, wanted)
        if mode not in self._functions:
            function = _Exported(self.path, self.manifest, mode)
            if (function.params, function.carry) != (self._acting.params, self._acting.carry):
                raise UserError(f"{self.path / function_name(mode)} takes other weights, or "
                                f"another carry, than {function_name(self.manifest.acting)}: "
                                "export again.")
            self._functions[mode] = function
        return self._functions[mode](self.params, given, keys, carry)

    def initial_carry(self, rows: int) -> dict:
        """The carry at the start of an episode: arrays [rows, ...] of zeros."""
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), self._acting.carry)

    def _mode(self, given: Mapping[str, np.ndarray], wanted: Sequence[str]) -> Mode:
        found = {name: (x.shape[1:], np.dtype(x.dtype)) for name, x in given.items()}
        modes = [mode for mode in self.manifest.modes if set(mode[1]) == set(wanted)]
        for mode in modes:
            if given_arrays(self.manifest.spec, mode[0]) == found:
                return mode
        if not modes:
            names = ", ".join(map(function_name, self.manifest.modes))
            raise UserError(f"{self.path} has no function that predicts {' and '.join(wanted)}; "
                            f"it has {names}.")
        expected = given_arrays(self.manifest.spec, modes[0][0])
        wrong = [f"{name} is {_shown(found.get(name))}, not {_shown(expected.get(name))}"
                 for name in sorted(expected | found) if expected.get(name) != found.get(name)]
        raise UserError(f"{self.path / function_name(modes[0])} is given other arrays: "
                        f"{'; '.join(wrong)}.")


def save(path: epath.PathLike, manifest: Mapping, params: dict, functions: Mapping[Mode, bytes],
         text_embeddings: epath.PathLike = ""):
    """Writes a bundle; policy.json comes last, so that a bundle that has it is complete. What a
    writing that failed has left in the folder is removed.

    Args:
      path: the folder; it is made, and holds nothing yet.
      manifest: the fields of `Manifest` as JSON values; format_version, modes, files and sha256 are
        filled in.
      params: nested dict of arrays, in the dtypes of the exported functions.
      functions: mode to `jax.export.Exported.serialize()` of its function.
      text_embeddings: folder to copy, when the spec has a text_width.

    Raises:
      UserError: the manifest has an unknown, missing or wrong field.
      UserError: the folder is not empty.
      OSError: a file cannot be written.
    """
    path, manifest = epath.Path(path).resolve(), {**manifest, "modes": tuple(functions)}
    checked = _checked(manifest, {})
    claim(path)
    try:
        with naming(path / "params"), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "params", params)
        for mode, function in functions.items():
            _write(path / function_name(mode), function)
        if checked.spec.text_width:
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
    """Writes policy.json for the files in the folder `path`.

    Args:
      path: the folder.
      manifest: as for `save`, with modes.

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


def text_reader(path: epath.PathLike, manifest: Manifest) -> Callable[[str], np.ndarray]:
    """The function from an instruction to the array "text" of an observation, without B.

    It raises UserError for a text that is too long, or has no embedding in the bundle at `path`.
    """
    length = manifest.spec.text_length
    if manifest.spec.text_width:
        embeddings = TextEmbeddings(epath.Path(path) / "text_embeddings")
        read = functools.partial(embeddings.lookup, length=length)
    else:
        read = functools.lru_cache(ByteTokenizer(length).encode)
    return lambda instruction: read(describe(manifest.robot, manifest.camera_text, instruction))


def load(path: epath.PathLike) -> Bundle:
    """Reads a bundle, puts its weights on the default device and compiles what it acts by.

    Raises:
      UserError: there is no bundle, or a part of it is missing or damaged.
      UserError: a part is of another format, for another platform, does more than compute (see
        `policy.program`), or does not fit the others.
    """
    path = epath.Path(path).resolve()
    manifest = read_manifest(path)
    if absent := {function_name(mode) for mode in manifest.modes} - manifest.files.keys():
        raise UserError(f"{path / 'policy.json'} lists a mode, but no file {min(absent)}: export "
                        "the bundle again.")
    digests.check_files(path, manifest.files)
    acting = _Exported(path, manifest, manifest.acting)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), acting.params)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", target)
    except (ValueError, KeyError, TypeError) as error:
        if os_error(error):  # Of TensorStore.
            raise
        raise UserError(f"{path / 'params'} does not hold the weights of "
                        f"{function_name(manifest.acting)}: {_line(error)}") from error
    acting.compile()
    return Bundle(path, manifest, params, acting)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _spec(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _specs(avals) -> list[jax.ShapeDtypeStruct]:
    return [_spec(aval.dtype, *aval.shape) for aval in avals]


def _shown(array: tuple | None) -> str:
    return f"{array[1]}[B, {', '.join(map(str, array[0]))}]" if array else "absent"
