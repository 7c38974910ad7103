"""LIBERO's tasks solved by the scripted expert, rendered and kept if the task's predicate holds.

    python -m data_builders.build libero_scripted --suites=libero_object,libero_spatial \
        --episodes=50 --image_size=128 --out=DIR

Episodes start from the environment's own random placements, never from the benchmark's initial
states. How often the expert succeeds, and how fast: benchmarks/results/libero_expert.json.
"""

import dataclasses

import numpy as np

from data_builders import builder, episode
from data_builders.builder import Skip, option
from jaxvp.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, Share
from jaxvp.envs import libero, libero_expert, libero_scene
from jaxvp.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.Builder):
    """LIBERO by a scripted expert: a Panda arm, agentview and wrist camera, 20 steps per second."""

    name = "libero_scripted"
    version = "1.0.0"
    items_per_shard = 10  # An episode takes 20 s; a stopped build loses less of them.

    suites: tuple[str, ...] = option(("libero_object", "libero_spatial"), "suites of tasks")
    tasks: tuple[str, ...] = option((), "numbers of tasks in each suite; empty: all")
    episodes: PositiveInt = option(50, "tries per task; those that fail are left out, and counted")
    image_size: PositiveInt = option(128, "height and width of images in pixels")
    fps: PositiveInt = option(
        20, "images per second that are rendered, a divisor of 20: the steps between repeat the "
        "last, and readers start clips only where an image is of the moment; actions stay at 20")
    rotation: str = option("180", "`180` as published policies use it, mirrored; `flip`; `none`",
                           tuple(libero.ROTATIONS))
    permuted: Share = option(
        0.0, "share of episodes in which objects on the table exchange their places")
    anywhere: Share = option(
        0.0, "share of episodes in which they are wherever the arm reaches")
    noisy: Share = option(
        0.0, "share of episodes with noise on the executed action; the recorded one is the "
        "expert's own, which corrects it (DART, arXiv 1703.09327)")
    noise: NonNegativeFloat = option(0.1, "its standard deviation, in units of the action")
    recoveries: Share = option(
        0.0, "share of episodes in which the arm is pushed away twice, labels as with noise")
    vary: Share = option(
        0.0, "differences of light and camera: 0.1 is 10 % of brightness, 1 cm, and 6 degrees")
    wait_steps: NonNegativeInt = option(
        libero_scene.WAIT_STEPS, "still steps before an episode, which are not stored")
    seed: Seed = option(1_000_000, "of the first episode of each task")

    def features(self):
        size = (self.image_size, self.image_size)
        return episode.features(
            dict.fromkeys(libero.CAMERAS, size), libero.STATE_NAMES, libero.ACTION_NAMES
        )

    def items(self) -> list[tuple[str, str, int]]:
        """(suite, task, seed) of every try.

        Raises:
          UserError: an option has no such value, or LIBERO is not installed as it should be.
        """
        if not self.suites:
            raise UserError(f"--suites is empty: choose of {', '.join(libero.SUITES)}.")
        for suite in self.suites:
            if suite not in libero.SUITES:
                raise UserError(f"--suites: no suite {suite!r}.{did_you_mean(suite, libero.SUITES)}"
                                f" There are {', '.join(libero.SUITES)}.")
        if libero.FPS % self.fps:
            raise UserError(f"--fps must divide {libero.FPS}, the steps per second, found "
                            f"{self.fps}.")
        if self.permuted + self.anywhere > 1:
            raise UserError("--permuted and --anywhere are shares of the same episodes, together "
                            f"at most 1, found {self.permuted:g} and {self.anywhere:g}.")
        libero.setup()
        return [(suite, task, self.seed + number)
                for suite in self.suites
                for task in self._chosen(libero.tasks(suite))
                for number in range(self.episodes)]

    def _chosen(self, tasks: tuple[str, ...]) -> list[str]:
        for number in self.tasks:
            if not number.isdecimal() or int(number) >= len(tasks):
                raise UserError(f"--tasks are numbers from 0 to {len(tasks) - 1}, found "
                                f"{number!r}.")
        return [tasks[int(number)] for number in self.tasks] or list(tasks)

    def build(self, item: tuple[str, str, int]):
        suite, task, seed = item
        env = libero.the_environment(suite, task, self.image_size, self.rotation)
        rng = np.random.default_rng([seed, *task.encode()])
        drawn, noisy, pushed = rng.random(3)
        placement = ("permuted" if drawn < self.permuted
                     else "anywhere" if drawn < self.permuted + self.anywhere else "task")
        observation = libero_scene.reset(
            env, int(rng.integers(2**31)), placement, self.vary, self.wait_steps)
        stride = libero.FPS // self.fps
        seen, actions, images = [], [], None
        steps = libero_expert.demonstration(
            env, observation, int(rng.integers(2**31)),
            noise=self.noise if noisy < self.noisy else 0, pushes=2 * (pushed < self.recoveries))
        for observation, action in steps:
            if len(actions) % stride == 0:
                images = dict(observation["images"])
            seen.append((images, observation["state"]))
            actions.append(action)
        if not libero_expert.solved(env):
            raise Skip(f"{suite} {libero.tasks(suite).index(task)}: not successful")
        yield episode.Episode(
            dataset=suite,
            episode_id=f"{suite}/{task}/{seed}",
            robot=libero.ROBOT,
            images={camera: np.stack([shown[camera] for shown, _ in seen])
                    for camera in libero.CAMERAS},
            camera_text=libero.CAMERA_TEXT,
            state=np.stack([state for _, state in seen]),
            action=np.stack(actions),
            instruction=libero.instruction(suite, task),
            fps=libero.FPS,
            source=f"{suite}/{task}/{seed}: {placement}",
            options=self.options() | {"frame_stride": stride},
        )
