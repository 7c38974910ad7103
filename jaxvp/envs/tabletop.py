"""The embedded bimanual tabletop: language tasks, three cameras, an expert, exact optical flow.

It is small enough that a video policy of a million parameters learns it on a CPU in minutes.
Importing this module registers `jaxvp/Tabletop-v0` with gymnasium.
"""


import gymnasium
import numpy as np

from jaxvp.envs import tabletop_render as render
from jaxvp.envs import tabletop_tasks as tasks
from jaxvp.envs.tabletop_render import BACKGROUNDS, CAMERAS
from jaxvp.envs.tabletop_tasks import CORE_TASKS, DISTRACTORS, SEEN_TASKS, UNSEEN_TASKS, Task
from jaxvp.envs.tabletop_world import HIGH, LOW, MAX_MOVE
from jaxvp.errors import UserError, did_you_mean

__all__ = [
    "ACTION_NAMES",
    "BACKGROUNDS",
    "CAMERAS",
    "CAMERA_LAYOUT",
    "CAMERA_TEXT",
    "CORE_TASKS",
    "DISTRACTORS",
    "FPS",
    "ROBOT",
    "SEEN_TASKS",
    "TabletopEnv",
    "Task",
    "UNSEEN_TASKS",
]

FPS = 10.0
ROBOT = "tabletop"
CAMERA_LAYOUT = "bimanual"
CAMERA_TEXT = "one head camera and two wrist cameras"
ACTION_NAMES = tuple(
    f"{side}_{name}"
    for side in ("left", "right")
    for name in ("x [m]", "y [m]", "z [m]", "gripper [0 closed .. 1 open]")
)


def _choose(what, name, options):
    if name not in options:
        raise UserError(f"{what} {name!r} does not exist.{did_you_mean(name, options)} Choose from "
                        f"{', '.join(options)}.")
    return options[name]


class TabletopEnv(gymnasium.Env):
    """Two arms over a table, 10 control steps per second.

    Action and state, float32[8]: left x, y, z (m) and gripper (0 closed..1 open), the same right;
    actions are absolute targets, clipped to each arm's workspace, approached by at most 0.05 m and
    0.5 of gripper per step. A gripper that closes through 0.5 within 6 cm of a block or of its
    handle of the tray takes it, and lets go above 0.5. Observation: `head`, `left_wrist`,
    `right_wrist` uint8[H, W, 3] (top row first) and `state`. Reward 1 and the end upon success;
    truncated after `max_steps`.

    Args:
      task: a name in SEEN_TASKS or UNSEEN_TASKS.
      image_size: H = W of every camera, pixels.
      background: 'seen' or 'unseen' table tops, sampled per episode.
      distractors: 'none', 'seen' or 'unseen': 2 or 3 small things that do not matter.
      max_steps: control steps until truncation.
      disturbance: standard deviation in metres, per axis, of the noise on a full-speed move.

    Raises: ValueError for an unknown task, background, distractors or render mode, or images too
      small to show anything.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(FPS)}

    def __init__(
        self,
        task,
        *,
        image_size=64,
        background="seen",
        distractors="none",
        max_steps=60,
        disturbance=0.0,
        render_mode="rgb_array",
    ):
        self.task = _choose("task", task, SEEN_TASKS | UNSEEN_TASKS)
        self.backgrounds = _choose("background", background, BACKGROUNDS)
        _choose("distractors", distractors, DISTRACTORS)
        _choose("render mode", render_mode, {"rgb_array": None})
        if image_size < 16:
            raise UserError(f"image_size must be at least 16 pixels, found {image_size}")
        self.image_size = image_size
        self.distractors = distractors
        self.max_steps = max_steps
        self.disturbance = disturbance
        self.render_mode = render_mode
        low, high = (limit.reshape(-1).astype(np.float32) for limit in (LOW, HIGH))
        # gymnasium wants actions symmetric about 0: the whole table, clipped to each arm's reach.
        table = np.maximum(high, -low)
        self.action_space = gymnasium.spaces.Box(np.where(low < 0, -table, 0), table)
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {camera: image for camera in CAMERAS} | {"state": gymnasium.spaces.Box(low, high)}
        )
        self.world = None

    def reset(self, *, seed=None, options=None):
        """-> (observation, info). `seed` determines the whole episode."""
        super().reset(seed=seed)
        self.background = self.backgrounds[self.np_random.integers(len(self.backgrounds))]
        self.world = tasks.sample_world(self.task, self.np_random, self.distractors)
        self.steps = 0
        self.before = self._snapshot()
        return self._observe(), self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info). Raises UserError for an action
        that is not 8 finite numbers."""
        success = self.advance(action)
        truncated = self.steps >= self.max_steps
        return self._observe(), float(success), success, truncated, self._info()

    def expert_action(self):
        """float32[8]: what the scripted expert does now: the next position on the way to its
        waypoint. It looks at the world only, never at the past, so it also recovers from what
        others did."""
        target = tasks.expert_action(self.task, self.world).reshape(2, 4)
        move = target[:, :3] - self.world.arms[:, :3]
        distance = np.linalg.norm(move, axis=1, keepdims=True)
        move *= np.minimum(1, MAX_MOVE / np.maximum(distance, 1e-9))
        target[:, :3] = self.world.arms[:, :3] + move
        return target.reshape(8).astype(np.float32)

    def flow(self, camera):
        """float32[H, W, 2] pixels (u right, v down): where the surface seen in each pixel of the
        previous frame is in the current one, exact up to occlusion; zero after a reset."""
        _choose("camera", camera, dict.fromkeys(CAMERAS))
        now = self._snapshot()
        return render.flow(self.world.bodies, self.before, now, camera, self.image_size)

    def render(self):
        """uint8[H, 3W, 3]: the three cameras side by side."""
        return np.concatenate([self.image(camera) for camera in CAMERAS], axis=1)

    def image(self, camera):
        """uint8[H, W, 3]: what a camera sees now."""
        world = self.world
        return render.draw(
            self.background, world.bodies, world.positions, world.arms, camera, self.image_size
        )

    def advance(self, action):
        """The physics of a step, without pictures -> bool, whether the task is done. Raises as
        `step`."""
        action = np.asarray(action, np.float64)
        if action.shape != (8,) or not np.isfinite(action).all():
            names = ", ".join(ACTION_NAMES)
            raise UserError(f"an action must be 8 finite numbers ({names}), found {action}")
        self.before = self._snapshot()
        noise = self.np_random.normal(size=(2, 3)) * self.disturbance
        self.world.advance(action.reshape(2, 4), noise)
        self.steps += 1
        return bool(tasks.is_success(self.task, self.world))

    def _snapshot(self):
        return self.world.positions.copy(), self.world.arms.copy()

    def _observe(self):
        state = self.world.arms.reshape(-1).astype(np.float32)
        return {camera: self.image(camera) for camera in CAMERAS} | {"state": state}

    def _info(self):
        return {
            "success": bool(tasks.is_success(self.task, self.world)),
            "instruction": self.task.instruction,
            "task": self.task.name,
        }


gymnasium.register("jaxvp/Tabletop-v0", entry_point=TabletopEnv)
