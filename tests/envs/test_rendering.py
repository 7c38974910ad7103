"""Images that are rendered when they are read, upright, of any size."""

import numpy as np
import pytest

from jaxvp.envs import rendering
from jaxvp.errors import UserError

SCENE = """
<mujoco>
  <worldbody>
    <light pos="0 -1 3"/>
    <camera name="front" pos="0 -3 0" xyaxes="1 0 0 0 0 1"/>
    <geom type="sphere" size="0.4" pos="0 0 0.6" rgba="1 0 0 1"/>
    <geom type="sphere" size="0.4" pos="0.9 0 -0.6" rgba="0 0 1 1"/>
  </worldbody>
</mujoco>"""


def test_images_are_rendered_once_and_before_the_next_step():
    now, rendered = [0], []

    def render(camera):
        rendered.append(camera)
        return np.zeros((2, 2, 3), np.uint8)

    images = rendering.Images(("a", "b"), render, lambda: now[0])
    assert list(images) == ["a", "b"] and len(images) == 2 and not rendered
    assert images["a"] is images["a"] and rendered == ["a"]
    now[0] = 1
    assert images["a"].shape == (2, 2, 3)
    with pytest.raises(RuntimeError, match="b must be read before the environment's next step"):
        images["b"]
    with pytest.raises(KeyError):
        images["c"]


def test_renderer_shows_the_top_row_first_at_any_size():
    rendering.setup()
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = rendering.Renderer(model, 500, 700)  # MuJoCo's own limit is 480 x 640.
    image = renderer(data, "front").astype(int)
    renderer.close()
    renderer.close()
    assert image.shape == (500, 700, 3)
    red, blue = (np.argwhere(image[..., one] > image[..., two] + 60).mean(0)
                 for one, two in ((0, 2), (2, 0)))
    assert red[0] < 250 < blue[0] and red[1] < blue[1]


def test_closing_a_renderer_leaves_the_others_alone():
    rendering.setup()
    import mujoco

    models = [mujoco.MjModel.from_xml_string(SCENE.replace("1 0 0 1", colour))
              for colour in ("1 0 0 1", "0 1 0 1")]
    data = [mujoco.MjData(model) for model in models]
    for model, state in zip(models, data, strict=True):
        mujoco.mj_forward(model, state)
    one, other = (rendering.Renderer(model, 64, 64) for model in models)
    one(data[0], "front")
    before = other(data[1], "front").copy()
    one.close()
    np.testing.assert_array_equal(other(data[1], "front"), before)
    other.close()
    assert before.std() > 5


def test_osmesa_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(rendering.sys, "platform", "linux")
    monkeypatch.setattr(rendering.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="libOSMesa, which is not installed. Run: apt-get install"):
        rendering.setup()
