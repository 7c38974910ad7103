"""LIBERO without PyTorch: installation check, initial states, conventions; and the simulator."""

import importlib.util
import os
import pickle
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest

from jaxvp.envs import libero
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
    env = libero.LiberoEnv("libero_object", SOUP, 128, "none", SHARED / "assets")
    yield env
    env.close()


@pytest.fixture(scope="module")
def published():
    """States and stored observations of a published demonstration."""
    with h5py.File(SHARED / "published" / "libero_object" / f"{SOUP}_demo.hdf5") as file:
        yield file["data/demo_0"]


def write_init_states(path, content: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("states/data.pkl", content)
        archive.writestr("states/version", "3\n")


def torch_pickle(array):
    """What torch.save wrote in LIBERO's time, when numpy._core was numpy.core."""
    return pickle.dumps(array, 2).replace(b"numpy._core", b"numpy.core")


def test_init_states_are_read_without_torch(tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 7))
    write_init_states(tmp_path / "a", torch_pickle(states))
    np.testing.assert_array_equal(libero.read_init_states(tmp_path / "a"), states)


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    write_init_states(tmp_path / "a", pickle.dumps(Attack(), 2))
    with pytest.raises(ValueError, match="a does not hold.*mkdir, which is not allowed"):
        libero.read_init_states(tmp_path / "a")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("content", [torch_pickle(np.zeros(3)), torch_pickle([1, 2]), b"", None])
def test_other_init_files_are_refused(tmp_path, content):
    if content is None:
        (tmp_path / "a").write_text("no zip")
    else:
        write_init_states(tmp_path / "a", content)
    with pytest.raises(ValueError, match="tmp|/a "):
        libero.read_init_states(tmp_path / "a")


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
    assert libero.instruction(task) == words


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
    installed = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "bddl": "1.0.1", "mujoco": "3.3.7"}

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


def test_missing_assets_and_tasks_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(libero, "package", lambda: tmp_path)
    (tmp_path / "assets" / "scenes").mkdir(parents=True)
    with pytest.raises(UserError, match="has no articulated_objects.*--libero_assets=DIR"):
        libero.setup()
    with pytest.raises(ValueError, match="No LIBERO suite 'libero_11'; there are libero_spatial"):
        libero.tasks("libero_11")


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


def test_images_are_rendered_once_and_not_after_the_next_step():
    class Env:
        moment, rendered = 0, []

        def render(self, camera):
            self.rendered.append(camera)
            return np.zeros((2, 2, 3), np.uint8)

    env = Env()
    images = libero.Images(env)
    assert list(images) == ["agentview", "wrist"] and not env.rendered
    assert images["wrist"] is images["wrist"] and env.rendered == ["wrist"]
    env.moment += 1
    assert images["wrist"].shape == (2, 2, 3)
    with pytest.raises(RuntimeError, match="agentview must be read before"):
        images["agentview"]


@simulator
def test_every_suite_has_its_tasks_and_fifty_initial_states():
    assert [len(libero.tasks(suite)) for suite in libero.SUITES] == [10, 10, 10, 10, 90]
    for suite in libero.SUITES:
        for task in libero.tasks(suite):
            assert libero.init_states(suite, task).shape[0] == 50
            assert not set("_ABCDEFGHIJKLMNOPQRSTUVWXYZ") & set(libero.instruction(task)) - {"_"}
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
        # The recorder's images are two of the 25 physics steps older.
        assert np.abs(image - after).mean() < min(8, 0.4 * np.abs(image - before).mean())
        for name in ("180", "flip"):
            assert np.abs(image[libero.ROTATIONS[name]] - after).mean() > 20
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
def test_two_environments_render_their_own_scenes(env):
    start = libero.init_states("libero_object", SOUP)[0]
    alone = env.reset(start)["images"]["agentview"]
    other = libero.LiberoEnv("libero_goal", libero.tasks("libero_goal")[0], 48, "180",
                             SHARED / "assets")  # fmt: skip
    try:
        assert other.render("agentview").shape == (48, 48, 3)
        np.testing.assert_array_equal(env.render("agentview"), alone)
    finally:
        other.close()
