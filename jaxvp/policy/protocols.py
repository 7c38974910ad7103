"""What each kind of client sends and takes: a table of names and conversions.

A client kind is a row of CLIENTS. Its `openpi` form is what clients of openpi's WebSocket protocol
do; its `vla_eval` form is that of the benchmarks of Allen AI's harness. A row says which cameras,
state and action dimensions there are, in the names and units of jaxvp's datasets, so that a bundle
that means something else is refused before anything is served.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jaxvp.data import rates
from jaxvp.envs import libero
from jaxvp.errors import UserError
from jaxvp.evaluation import remote
from jaxvp.evaluation.protocol import Observation, Protocol
from jaxvp.policy.bundle import Manifest

GRIPPER = remote.GRIPPER
LARGEST = 1e9  # No robot is there; and a float32 holds it.
Convert = Callable[[np.ndarray], np.ndarray]


def same(values: np.ndarray) -> np.ndarray:
    """No conversion."""
    return values


def closes_at_one(values: np.ndarray) -> np.ndarray:
    """A gripper in the last dimension, 0 closed to 1 open, counted the other way round."""
    return np.concatenate([values[..., :-1], 1 - values[..., -1:]], -1)


def opens_at_one(values: np.ndarray) -> np.ndarray:
    """A gripper, 0 closed to 1 open, to -1 closed and 1 open."""
    return np.concatenate([values[..., :-1], 2 * values[..., -1:] - 1], -1)


def with_rotation_vector(values: np.ndarray) -> np.ndarray:
    """Roll, pitch and yaw (about the fixed axes x, y, z, in this order) in dimensions 3 to 5 become
    a rotation vector."""
    roll, pitch, yaw = (values[..., k] / 2 for k in (3, 4, 5))
    cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (np.cos, np.sin))
    w = cr * cp * cy + sr * sp * sy
    xyz = np.stack([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy,
                    cr * cp * sy - sr * sp * cy], -1)
    length = np.linalg.norm(xyz, axis=-1)
    scale = np.where(length > 1e-9, 2 * np.arctan2(length, w) / np.maximum(length, 1e-9), 2.0)
    return np.concatenate([values[..., :3], xyz * scale[..., None], values[..., 6:]], -1)


# Bridge counts rotations from a hand that looks down: the columns of this matrix are the axes.
LOOKING_DOWN = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], np.float64)


def bridge_state(values: np.ndarray) -> np.ndarray:
    """SimplerEnv's position, quaternion w x y z and open gripper [8] to Bridge's position, roll,
    pitch, yaw and gripper [7]."""
    w, x, y, z = values[3:7] / max(np.linalg.norm(values[3:7]), 1e-9)
    rotation = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]) @ LOOKING_DOWN.T
    angles = (np.arctan2(rotation[2, 1], rotation[2, 2]),
              np.arctan2(-rotation[2, 0], np.hypot(rotation[2, 1], rotation[2, 2])),
              np.arctan2(rotation[1, 0], rotation[0, 0]))
    return np.concatenate([values[:3], angles, values[7:]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """An observation as a client sends it, and actions as it takes them.

    Attributes:
      cameras: ours to the key of its image, uint8[H, W, 3]. A key "a.b" is b in the map a.
      state: keys whose numbers, one after the other, are the state.
      prompt: key of the instruction.
      state_size: how many numbers these are, when that is not what `to_state` gives.
      to_state, from_action: conversions of state float64[n] to ours and of actions float64[H, A]
        from ours.
      channels_first: images are uint8[3, H, W].
    """

    cameras: Mapping[str, str]
    state: tuple[str, ...] = ("state",)
    prompt: str = "prompt"
    state_size: int | None = None
    to_state: Convert = same
    from_action: Convert = same
    channels_first: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Client:
    """A kind of client.

    Attributes:
      openpi, vla_eval: its forms over the two protocols; None: it has none.
      state, action: dimensions with units, as ours: what it can send, and what it takes. A policy
        may read less than it sends.
      unused: actions that a policy may have and the client does not take.
      fps: actions per second; None: any.
      rotation: how its images are turned, as in `Protocol`.
      robot: in the data that policies for it are trained on; "": any.
      chunk: how many actions an answer has, when the client insists.
      vla_eval_params: what the benchmark of vla-eval is made with, so that it sends all this.
      protocol: of the benchmark, where the client is one.
    """

    openpi: Form | None = None
    vla_eval: Form | None = None
    state: tuple[str, ...]
    action: tuple[str, ...]
    unused: tuple[str, ...] = ()
    fps: float | None = None
    rotation: str = "180"
    robot: str = ""
    chunk: int | None = None
    vla_eval_params: Mapping = dataclasses.field(default_factory=dict)
    protocol: Protocol | None = None


def vla_eval_form(cameras: Mapping[str, str], state: str = "states", **fields) -> Form:
    """The form that all benchmarks of vla-eval have."""
    return Form(cameras={camera: f"images.{key}" for camera, key in cameras.items()},
                state=(state,), prompt="task_description", **fields)


def _benchmark(protocol: remote.RemoteProtocol, vla_eval: Form, **fields) -> Client:
    """The client that a remote benchmark is."""
    return Client(vla_eval=vla_eval, protocol=protocol, state=protocol.state,
                  action=protocol.action, rotation=protocol.rotation, robot=protocol.robot,
                  **fields)


_STATE = {"send_state": True}
_ALOHA = tuple(f"{side}_{name}" for side in ("left", "right") for name in (
    *(f"{joint} [rad]" for joint in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle",
                                     "wrist_rotate")), GRIPPER))
_ALOHA_CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
CLIENTS = {
    # examples/libero of openpi; LIBERO, LIBERO-PRO, -Plus, -Mem and RoboCerebra of vla-eval.
    "libero": Client(
        openpi=Form(cameras={"agentview": "observation/image", "wrist": "observation/wrist_image"},
                    state=("observation/state",), from_action=libero.to_libero),
        vla_eval=vla_eval_form({camera: camera for camera in libero.CAMERAS},
                               from_action=libero.to_libero),
        # The seed and the axis-angle of jaxvp's own suites.
        vla_eval_params={"send_wrist_image": True, "send_state": True, "env_seed": libero.SEED,
                         "quat_no_antipodal": True},
        state=libero.STATE_NAMES, action=libero.ACTION_NAMES, fps=libero.FPS, robot=libero.ROBOT),
    # examples/droid of openpi, whose robot moves by joint velocities.
    "droid": Client(
        openpi=Form(cameras={"agentview": "observation/exterior_image_1_left",
                             "wrist": "observation/wrist_image_left"},
                    state=("observation/joint_position", "observation/gripper_position"),
                    to_state=closes_at_one, from_action=closes_at_one),
        state=(*(f"joint_{i} [rad]" for i in range(1, 8)), GRIPPER),
        action=(*(f"joint_velocity_{i} [-1 .. 1]" for i in range(1, 8)), GRIPPER),
        fps=15.0, rotation="none", chunk=10),
    # examples/aloha_real of openpi.
    "aloha": Client(
        openpi=Form(cameras={name: f"images.{name}" for name in _ALOHA_CAMERAS},
                    channels_first=True),
        state=_ALOHA, action=_ALOHA, fps=50.0, rotation="none"),
    # examples/aloha_sim of openpi: gym-aloha, whose one camera it calls cam_high. Sends no prompt.
    "aloha_sim": Client(
        openpi=Form(cameras={"top": "images.cam_high"}, channels_first=True),
        state=_ALOHA, action=_ALOHA, fps=50.0, rotation="none"),
    "robocasa": _benchmark(
        remote.ROBOCASA,
        vla_eval_form({name: name for name in remote.ROBOCASA.cameras},
                      from_action=libero.to_libero),
        fps=20.0,
        unused=(*(f"base_motion_{name} [-1 .. 1]" for name in ("x", "y", "yaw")),
                "torso [-1 .. 1]", "control_mode [-1 arm .. 1 base]"),
        vla_eval_params=_STATE | {"camera_names": list(remote.ROBOCASA.cameras)}),
    "robotwin": _benchmark(
        remote.ROBOTWIN,
        vla_eval_form({"head": "head_camera", "left_wrist": "left_camera",
                       "right_wrist": "right_camera"}, state="joint_state")),
    "simpler": _benchmark(
        remote.SIMPLER_WIDOWX,
        vla_eval_form({"agentview": "primary"}, state_size=8, to_state=bridge_state,
                      from_action=with_rotation_vector),
        # simpler_env/policies/openpi of SimplerEnv: x y z, roll, pitch, yaw, a zero, the gripper.
        openpi=Form(cameras={"agentview": "observation/primary_image"},
                    state=("observation/state",), state_size=8,
                    to_state=lambda state: np.delete(state, 6)),
        fps=5.0, vla_eval_params=_STATE),
    "simpler_google": _benchmark(
        remote.SIMPLER_GOOGLE,
        vla_eval_form({"agentview": "primary"}, from_action=with_rotation_vector,
                      to_state=lambda state: state[[0, 1, 2, 4, 5, 6, 3, 7]]),  # w x y z to x y z w
        openpi=Form(cameras={"agentview": "observation/primary_image"},
                    state=("observation/state",), to_state=closes_at_one),
        fps=3.0, vla_eval_params=_STATE | {"gripper_mode": "sticky"}),
    # Not in the state of vla-eval's CALVIN: joints.
    "calvin": Client(
        vla_eval=vla_eval_form({"static": "rgb_static", "gripper": "rgb_gripper"},
                               to_state=lambda state: np.append(state[:7], (state[7] + 1) / 2),
                               from_action=opens_at_one),
        state=(*(f"eef_{axis} [m]" for axis in "xyz"),
               *(f"eef_euler_{axis} [rad]" for axis in "xyz"), "gripper_width [m]",
               "gripper_command [0 closed .. 1 open]"),
        action=(*(f"eef_delta_{axis} [0.02 m]" for axis in "xyz"),
                *(f"eef_delta_euler_{axis} [0.05 rad]" for axis in "xyz"), GRIPPER),
        fps=30.0, rotation="none", vla_eval_params=_STATE | {"send_wrist_image": True}),
}
OWN = "jaxvp"  # The kind that has the names of the bundle itself.


def client(kind: str, manifest: Manifest) -> Client:
    """The row of CLIENTS, or for OWN the one that has the bundle's own names."""
    if kind != OWN:
        return CLIENTS[kind]
    cameras = {name: name for name in manifest.cameras if name is not None}
    return Client(
        openpi=Form(cameras={name: f"images.{name}" for name in cameras}),
        vla_eval=vla_eval_form(cameras), state=manifest.dimensions("state"),
        action=manifest.dimensions("action"),
        rotation=manifest.protocol.get("rotation", "none"))


def check_fit(kind: str, row: Client, manifest: Manifest):
    """Makes sure that the bundle's policy means by its inputs and outputs what the client does.

    Raises:
      UserError: it does not.
    """
    cameras = [camera for camera in manifest.cameras if camera is not None]
    known = {camera for form in (row.openpi, row.vla_eval) if form for camera in form.cameras}
    actions, state = manifest.dimensions("action"), manifest.dimensions("state")
    rotation = manifest.protocol.get("rotation", row.rotation)
    for what, ours, fits, theirs in (
        ("robot", manifest.robot, row.robot in ("", manifest.robot), row.robot),
        ("cameras", tuple(cameras), known.issuperset(cameras), tuple(sorted(known))),
        ("rotation of the images", rotation, rotation == row.rotation, row.rotation),
        ("state", state, set(row.state).issuperset(state), row.state),
        ("actions", actions, set(row.action) <= set(actions) <= {*row.action, *row.unused},
         row.action),
        ("actions per second", manifest.fps,
         row.fps is None or rates.same(manifest.fps, row.fps), row.fps),
        ("actions in a chunk", manifest.spec.window.chunk,
         manifest.spec.window.chunk >= (row.chunk or 1), f"at least {row.chunk}"),
    ):
        if not fits:
            raise UserError(
                f"The bundle does not fit --client={kind}: {what}: the bundle has {ours}, the "
                f"client {theirs}. Choose the kind of client that sends what the policy was "
                f"trained on; --client={OWN} has the bundle's own names.")


class Translator:
    """Between one kind of client, over one protocol, and a policy.

    Args:
      row: the kind.
      form: that of the protocol.
      manifest: of a bundle that fits it.
      default_prompt: the instruction of observations that have none; "": they are refused.
    """

    def __init__(self, row: Client, form: Form, manifest: Manifest, default_prompt: str = ""):
        self.row, self.form, self._default_prompt = row, form, default_prompt
        self._robot = manifest.robot
        self._cameras = {camera: form.cameras[camera] for camera in manifest.cameras
                         if camera in form.cameras}
        if absent := [c for c in manifest.cameras if c is not None and c not in form.cameras]:
            raise UserError(f"The bundle sees the camera {absent[0]!r}, which this client does not "
                            f"send: it sends {', '.join(form.cameras)}.")
        self._state = [row.state.index(name) for name in manifest.dimensions("state")]
        names = manifest.dimensions("action")
        self._action = [names.index(name) for name in row.action]

    @property
    def keys(self) -> tuple[str, ...]:
        """Of an observation."""
        return (*self._cameras.values(), *(self.form.state if self._state else ()),
                self.form.prompt)

    def observation(self, message: Mapping) -> Observation:
        """What a client sent, as a policy takes it.

        Raises:
          UserError: a key is missing, or is something else than an image, numbers or text.
        """
        if self.form.prompt in message or not self._default_prompt:
            prompt = _find(message, self.form.prompt)
        else:
            prompt = self._default_prompt
        if not isinstance(prompt, str):
            raise UserError(f"{self.form.prompt} must be text, found {_shown(prompt)}.")
        images = {camera: self._image(message, key) for camera, key in self._cameras.items()}
        state = np.zeros(0, np.float32)
        if self._state:
            state = self._numbers(message)[self._state].astype(np.float32)
        return {"images": images, "state": state, "instruction": prompt, "robot": self._robot}

    def actions(self, chunk: np.ndarray) -> np.ndarray:
        """float32[n, A] of the policy, in SI units, to what the client takes, float32[n, A']."""
        return self.form.from_action(chunk.astype(np.float64)[..., self._action]).astype(np.float32)

    def _image(self, message: Mapping, key: str) -> np.ndarray:
        image, first = _find(message, key), self.form.channels_first
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
                and image.shape[0 if first else 2] == 3 and image.size):
            raise UserError(f"{key} must be uint8{'[3, H, W]' if first else '[H, W, 3]'}, found "
                            f"{_shown(image)}.")
        return np.ascontiguousarray(image.transpose(1, 2, 0)) if first else image

    def _numbers(self, message: Mapping) -> np.ndarray:
        """The state float64[S] in our units."""
        parts = []
        for key in self.form.state:
            value = _find(message, key)
            value = np.asarray(value) if isinstance(value, int | float) else value
            if not (isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
                    and (np.abs(value) < LARGEST).all()):
                raise UserError(f"{key} must be finite numbers, found {_shown(value)}.")
            parts.append(value.ravel())
        values = np.concatenate(parts).astype(np.float64)
        if len(values) != (size := self.form.state_size or len(self.row.state)):
            raise UserError(f"{' and '.join(self.form.state)} must have {size} numbers, found "
                            f"{len(values)}.")
        return self.form.to_state(values)


def _find(message: Mapping, key: str):
    """What has the key; "a.b" is b in the map a.

    Raises:
      UserError: nothing has it.
    """
    value = message
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            found = ", ".join(_keys(message)) or "nothing"
            raise UserError(f"The observation has no {key}; found {found:.400}.{_advice(message)}")
        value = value[name]
    return value


def _keys(message: Mapping) -> list[str]:
    return [f"{name}.{inner}" if isinstance(value, Mapping) else f"{name}"
            for name, value in list(message.items())[:50]
            for inner in (list(value)[:50] if isinstance(value, Mapping) else ("",))]


def _advice(message: Mapping) -> str:
    """Which kind of client sends such keys."""
    found = set(_keys(message))
    kinds = [kind for kind, row in CLIENTS.items() for form in (row.openpi, row.vla_eval)
             if form and found >= {*form.cameras.values(), *form.state}]
    return f" Such observations are for --client={kinds[0]}." if kinds else ""


def _shown(value) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__
