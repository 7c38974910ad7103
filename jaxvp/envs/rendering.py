"""What simulators on MuJoCo share: OpenGL, and images that are rendered when they are read."""

import ctypes.util
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from importlib import metadata

import numpy as np

from jaxvp.errors import UserError

ROTATIONS = {"180": np.s_[::-1, ::-1], "flip": np.s_[::-1], "none": np.s_[:]}


def setup(packages: str = "apt-get install libosmesa6"):
    """Chooses OSMesa on Linux, unless MUJOCO_GL says otherwise; before MuJoCo is imported.

    Args:
      packages: the command that installs what the simulator renders with.

    Raises:
      UserError: the library of MUJOCO_GL is not installed.
    """
    logging.getLogger("OpenGL.acceleratesupport").setLevel(logging.ERROR)  # Advice.
    if sys.platform != "linux":
        return
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    if os.environ["MUJOCO_GL"] == "osmesa" and not ctypes.util.find_library("OSMesa"):
        raise UserError("MUJOCO_GL=osmesa renders with libOSMesa, which is not installed. "
                        f"Run: {packages}; or set MUJOCO_GL=egl to render on a GPU.")
    if os.environ["MUJOCO_GL"] == "egl" and not ctypes.util.find_library("EGL"):
        raise UserError("MUJOCO_GL=egl renders on a GPU with libEGL, which is not installed. "
                        "Install the GPU's driver; or set MUJOCO_GL=osmesa, and run: "
                        f"{packages}")


def simulator(*packages: str) -> str:
    """Versions of everything that changes what a policy sees: packages, and OpenGL."""
    names = [f"{name} {metadata.version(name)}" for name in packages]
    return ", ".join([*names, os.environ.get("MUJOCO_GL", "glfw")])


class Images(Mapping):
    """Camera to uint8[H, W, 3] of one moment, rendered when first read, before the next step.

    OSMesa takes longer for an image than physics for a step, and a policy that executes chunks of
    actions looks once per chunk.

    Args:
      cameras: their names.
      render: camera to its image now.
      now: a number that changes when the simulator's state does.
    """

    def __init__(self, cameras: tuple[str, ...], render: Callable[[str], np.ndarray],
                 now: Callable[[], int]):
        self._cameras, self._render, self._now = cameras, render, now
        self._moment, self._images = now(), {}

    def __getitem__(self, camera: str) -> np.ndarray:
        if camera not in self._cameras:
            raise KeyError(camera)
        if camera not in self._images:
            if self._moment != self._now():
                raise RuntimeError(f"{camera} must be read before the environment's next step.")
            self._images[camera] = self._render(camera)
        return self._images[camera]

    def __iter__(self):
        return iter(self._cameras)

    def __len__(self):
        return len(self._cameras)


class Renderer:
    """Renders a model off-screen; the OpenGL context is made for the first image.

    Args:
      model: mujoco.MjModel; its limit on the size of images is raised.
      height, width: in pixels.
    """

    def __init__(self, model, height: int, width: int):
        self._model, self._size, self._renderer = model, (height, width), None

    def __call__(self, data, camera: str) -> np.ndarray:
        """uint8[height, width, 3] RGB, top row first, of a mujoco.MjData."""
        if self._renderer is None:
            import mujoco

            limit = self._model.vis.global_
            limit.offheight = max(limit.offheight, self._size[0])
            limit.offwidth = max(limit.offwidth, self._size[1])
            self._renderer = mujoco.Renderer(self._model, *self._size)
            # At the end of the program, its own way to free OpenGL comes too late and complains.
            weakref.finalize(self, _close, self._renderer)
        self._renderer.update_scene(data, camera)
        return self._renderer.render()

    def close(self):
        if self._renderer is not None:
            _close(self._renderer)
            self._renderer = None


def _close(renderer):
    """MuJoCo frees textures and meshes by their numbers, in whatever OpenGL context is current,
    which may be another renderer's."""
    if renderer._gl_context is not None:
        renderer._gl_context.make_current()
    renderer.close()
