import numpy as np
import pytest

from jaxvp.envs import tabletop_render as render
from jaxvp.envs.tabletop import CAMERAS, TabletopEnv
from jaxvp.envs.tabletop_world import BODIES, HOME

GREY = render.Background("plain", (128, 128, 128), (128, 128, 128))
SIZE = 64
SCALE = SIZE / (2 * render.HEAD_HALF)  # pixels per metre of the head camera


def scene(position, arms=HOME):
    """(positions, arms) with one body."""
    return np.array([position], float), np.array(arms)


def picture(position, camera="head", arms=HOME, name="red", size=SIZE):
    return render.draw(GREY, (BODIES[name],), *scene(position, arms), camera, size)


def redness(image):
    return (image[..., 0].astype(float) - image[..., 1] - 2).clip(0)  # the floor has 2


def centre(image):
    weight = redness(image)
    v, u = np.mgrid[: len(image), : len(image)] + 0.5
    return np.array([(u * weight).sum(), (v * weight).sum()]) / weight.sum()


def test_head_camera_shows_where_things_are():
    here = centre(picture((0, 0, 0)))
    right, away, up = (centre(picture(p)) for p in ((0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1)))
    np.testing.assert_allclose(right - here, (0.1 * SCALE, 0), atol=0.05)
    np.testing.assert_allclose(away - here, (0, -0.1 * SCALE), atol=0.05)
    np.testing.assert_allclose(up - here, (0, -0.05 * SCALE), atol=0.3)  # its shadow is no red


@pytest.mark.parametrize("kind", ["red", "plate", "bowl"])
def test_a_tenth_of_a_pixel_shows_at_32(kind):
    a, b = (picture((x, 0.1, 0), name=kind, size=32).astype(int) for x in (0, 0.1 * 0.84 / 32))
    assert np.abs(a - b).max() >= 5


@pytest.mark.parametrize("size", [32, 48, 64])
def test_the_gripper_opening_shows_in_the_head_and_its_own_camera(size):
    for camera in ("head", "left_wrist"):
        arms = np.array([HOME, HOME])
        arms[1, 0, 3] = 0
        a, b = (picture((0.3, 0.3, 0), camera, arm, size=size).astype(int) for arm in arms)
        assert (np.abs(a - b).max(-1) > 40).sum() >= 4


def test_wrist_camera_looks_straight_down():
    arms = HOME.copy()
    arms[0] = (-0.2, 0.1, 0.1, 1)
    np.testing.assert_allclose(
        centre(picture((-0.2, 0.1, 0), "left_wrist", arms)), (SIZE / 2, SIZE / 2), atol=0.05
    )
    u, v = centre(picture((-0.17, 0.13, 0), "left_wrist", arms)) - SIZE / 2
    assert u == pytest.approx(0.03 * SIZE / 0.28, abs=0.1) == -v


@pytest.mark.parametrize("kind", ["disc", "diamond", "triangle", "capsule", "box"])
def test_coverage_is_the_area(kind):
    area = {
        "disc": np.pi * 100,
        "diamond": 200,
        "triangle": 3 * np.sqrt(3) / 4 * 100,
        "capsule": np.pi * 25 + 10 * 20,
        "box": 20 * 10.5,
    }[kind]
    numbers = {"capsule": (20.3, 30, 20.3, 50, 5), "box": (10.25, 20.5, 30.25, 31)}
    shape = render.Shape(None, kind, numbers.get(kind, (30.2, 30.7, 10)), (0, 0, 0))
    region, cover = render.coverage(shape, SIZE)
    assert (
        cover.min() >= 0
        and cover.max() <= 1
        and cover.shape == np.zeros((3, 64, 64))[region][0].shape
    )
    assert cover.sum() == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize("numbers", [(-20, 10, 5), (100, 10, 5), (10, -9, 5), (10, 90, 5)])
def test_nothing_outside_the_picture(numbers):
    assert render.coverage(render.Shape(None, "disc", numbers, (0, 0, 0)), SIZE) == (None, None)


def test_head_flow_of_a_block_is_its_displacement():
    bodies, (x, y, z) = (BODIES["red"],), (0.1, 0.1, 0.05)
    move = np.array([0.031, -0.017, 0.023])
    before, after = scene((x, y, z)), scene((x, y, z) + move)
    flow = render.flow(bodies, before, after, "head", SIZE)
    block = redness(render.draw(GREY, bodies, *before, "head", SIZE)) > 120
    expected = (move[0] * SCALE, -(move[1] + render.TILT * move[2]) * SCALE)
    assert block.sum() > 20
    np.testing.assert_allclose(flow[block], np.tile(expected, (block.sum(), 1)), atol=1e-4)
    assert (flow[:30, :20] == 0).all() and (flow[50:, 28:36] == 0).all()


def test_wrist_flow_is_opposite_to_the_hand():
    bodies = (BODIES["red"],)
    arms = HOME.copy()
    arms[0] = (-0.2, 0.1, 0.1, 1)
    moved = arms.copy()
    moved[0, :2] += (0.02, 0.01)
    flow = render.flow(bodies, scene((-0.2, 0.12, 0), arms), scene((-0.2, 0.12, 0), moved),
                       "left_wrist", SIZE)  # fmt: skip
    scale = SIZE / 0.28
    fingers = np.abs(flow).max(-1) == 0
    assert 0 < fingers.sum() < 0.1 * SIZE**2  # which hang on the camera
    np.testing.assert_allclose(
        flow[~fingers], np.tile((-0.02 * scale, 0.01 * scale), ((~fingers).sum(), 1)), atol=1e-4
    )
    raised = arms.copy()
    raised[0, 2] += 0.05
    flow = render.flow(bodies, scene((-0.2, 0.12, 0), arms), scene((-0.2, 0.12, 0), raised),
                       "left_wrist", SIZE)  # fmt: skip
    zoom = 0.14 / 0.15
    np.testing.assert_allclose(flow[0, 0], (0.5 - SIZE / 2) * (zoom - 1) * np.ones(2), atol=1e-4)


def test_flow_along_an_arm_grows_from_the_shoulder_to_the_hand():
    a, b = (20, 60, 20, 20, 3), (20, 60, 28, 20, 3)
    moved = render.motion("capsule", a, b, np.full(3, 20.0), np.array([60.0, 40, 20]))
    np.testing.assert_allclose(moved, [[0, 4, 8], [0, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("task", ["red_and_green_on_plate", "lift_tray", "hand_over_green"])
def test_warping_by_the_flow_gives_the_next_frame(monkeypatch, camera, task):
    monkeypatch.setattr(render, "_shadows", lambda *_: [])  # they move, but are nothing
    size = 96
    env = TabletopEnv(task, image_size=size, background="unseen", disturbance=0.01)

    def owner():
        """The name of what each pixel shows, and whether all four neighbours show the same."""
        world = env.world
        where = render.view(camera, world.arms, size)
        shapes = render.shapes(world.bodies, world.positions, world.arms, camera, where)
        keys = np.array([str(shape.key) for shape in shapes] + ["background"])
        name = keys[render.owners(shapes, size)]
        inside = np.zeros((size, size), bool)
        inside[1:-1, 1:-1] = np.all(
            [np.roll(name, d, a) == name for d in (-1, 1) for a in (0, 1)], axis=0
        )[1:-1, 1:-1]
        return name, inside

    before = env.reset(seed=1)[0][camera]
    name, inside = owner()
    np.testing.assert_allclose(env.flow(camera), 0, atol=1e-4)
    compared = moved = wrong = 0
    for _ in range(25):
        after = env.step(env.expert_action())[0][camera]
        flow = env.flow(camera)
        assert flow.shape == (size, size, 2) and flow.dtype == np.float32
        v, u = np.nonzero(inside)
        to = np.rint(np.stack([v, u]) + flow[v, u, ::-1].T).astype(int)
        keep = (to >= 0).all(0) & (to < size).all(0)
        v, u, (to_v, to_u) = v[keep], u[keep], to[:, keep]
        name_before = name[v, u]
        name, inside = owner()
        seen = inside[to_v, to_u] & (name[to_v, to_u] == name_before)  # neither covered nor left
        error = np.abs(after[to_v, to_u].astype(int) - before[v, u]).max(-1)[seen]
        compared += len(error)
        moved += (np.abs(flow[v, u][seen]).max(-1) > 0.5).sum()
        wrong += (error > 12).sum()
        before = after
    assert compared > 25 * size**2 / 2 and moved > 500
    assert wrong / compared < 0.002
