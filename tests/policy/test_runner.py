"""The closed loop around a bundle, with a stand-in for the bundle."""

import types

import numpy as np
import pytest
import toy_bundle

from jaxvp.config import build
from jaxvp.data import text_embeddings
from jaxvp.data.observation import describe
from jaxvp.data.text import ByteTokenizer
from jaxvp.policy.bundle import Manifest, save
from jaxvp.policy.runner import PolicyRunner


class Bundle(types.SimpleNamespace):
    """Answers with its counter in every action, and keeps what it was asked."""

    def __init__(self, **changes):
        values = toy_bundle.manifest(format_version=2, files={}, sha256="", **changes)
        super().__init__(manifest=build(Manifest, values), calls=[])

    def act(self, observation, keys):
        self.calls.append((observation, keys))
        shape = (len(keys), self.manifest.chunk, self.manifest.action_size)
        steps = np.linspace(-1, 1, self.manifest.chunk, dtype=np.float32)
        return np.broadcast_to(steps[:, None], shape)


def observation(**changes):
    images = {camera: np.full((16, 16, 3), value, np.uint8)
              for camera, value in (("head", 10), ("left_wrist", 20), ("right_wrist", 30))}
    return {"images": images, "state": np.array([0.4, 0, 0.3, 0, 0, 0, 0, 1], np.float32),
            "instruction": "lift the tray", "robot": "tabletop", **changes}


def runner(bundle, seed=0, slots=(0,)):
    result = PolicyRunner(bundle, seed)
    for slot in slots:
        result.reset(slot, "task", trial=slot)
    return result


def test_plan_is_the_first_part_of_a_chunk_in_si_units():
    bundle = Bundle(chunk=5, execution_horizon=3)
    plan = runner(bundle).plan({0: observation()})[0]
    assert plan.shape == (3, 8) and plan.dtype == np.float32
    np.testing.assert_allclose(plan[:, 0], [-0.4, -0.2, 0.0], atol=1e-6)  # x in metres
    np.testing.assert_allclose(plan[:, 7], [0.0, 0.25, 0.5], atol=1e-6)  # gripper


def test_embedded_text_comes_with_the_bundle(tmp_path):
    seen = observation()
    text = describe(seen["robot"], toy_bundle.tabletop.CAMERA_TEXT, seen["instruction"])
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    text_embeddings.add(tmp_path / "made", [text], "toy", 4, lambda texts: [rows])
    values = toy_bundle.manifest(text_width=4, text_length=5)
    save(tmp_path / "bundle", values, toy_bundle.PARAMS, b"", None, tmp_path / "made")
    bundle = Bundle(text_width=4, text_length=5)
    bundle.path = tmp_path / "bundle"
    policy = runner(bundle)
    found = policy.batch([seen])["text"]
    assert found.shape == (1, 5, 4) and found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found[0].astype(np.float32), [*rows, [0] * 4, [0] * 4])
    with pytest.raises(ValueError, match="no embedding of the text.*fold the towel"):
        policy.plan({0: observation(instruction="fold the towel")})


def test_batch():
    bundle = Bundle()
    batch = runner(bundle).batch([observation(), observation(instruction="x")])
    assert {name: (v.shape, v.dtype.name) for name, v in batch.items()} == {
        "video": ((2, 3, 1, 16, 16, 3), "uint8"), "view_mask": ((2, 3), "bool"),
        "text": ((2, toy_bundle.TEXT), "int32"), "state": ((2, 8), "float32"),
        "state_mask": ((2, 8), "bool")}
    np.testing.assert_array_equal(batch["video"][0, :, 0, 3, 3, 1], [10, 20, 30])
    np.testing.assert_allclose(batch["state"][0], [1, 0, 1, -1, 0, 0, -1, 1], atol=1e-6)
    text = ByteTokenizer(toy_bundle.TEXT).decode(batch["text"][0])
    assert text == "tabletop; one head camera and two wrist cameras; lift the tray"
    assert batch["view_mask"].all() and batch["state_mask"].all()


def test_white_space_in_an_instruction_makes_no_other_tokens():
    policy = runner(Bundle())
    ragged, clean = (policy.batch([observation(instruction=text)])["text"]
                     for text in (" lift  the\ttray\n", "lift the tray"))
    np.testing.assert_array_equal(ragged, clean)


def test_images_of_another_size():
    images = {"head": np.repeat([[[0], [200]]], 64, 0).repeat(32, 1).repeat(3, 2).astype(np.uint8)}
    video = runner(Bundle()).batch([observation(images=images)])["video"][0, 0, 0]
    assert video.shape == (16, 16, 3) and (video[:, 0] == 0).all() and (video[:, 15] == 200).all()


def test_missing_cameras_are_masked_and_grey():
    images = {"right_wrist": np.zeros((16, 16, 3), np.uint8)}
    batch = runner(Bundle(cameras=["head", None, "right_wrist"])).batch(
        [observation(), observation(images=images)])
    np.testing.assert_array_equal(batch["view_mask"], [[True, False, True], [False, False, True]])
    assert (batch["video"][0, 1] == 127).all() and (batch["video"][1, 0] == 127).all()


def test_padded_dimensions_and_no_state():
    batch = runner(Bundle(state=None, state_size=3)).batch([observation()])
    assert not batch["state_mask"].any() and batch["state"].shape == (1, 3)
    plan = runner(Bundle(action_size=12)).plan({0: observation()})[0]
    assert plan.shape[1] == 8


def test_noise_depends_on_seed_task_trial_and_step_only():
    def keys(seed=0, task="task", trial=1, plans=1, others=()):
        bundle = Bundle()
        policy = runner(bundle, seed, others)
        policy.reset(7, task, trial)
        for _ in range(plans):
            policy.plan({slot: observation() for slot in (*others, 7)})
        return tuple(bundle.calls[-1][1][-1])

    reference = keys()
    assert keys(others=(0, 1, 2)) == reference
    different = {keys(seed=1), keys(task="other"), keys(trial=2), keys(plans=2), reference}
    assert len(different) == 5


def test_other_robot():
    with pytest.raises(ValueError, match="trained for the robot 'tabletop'.*'libero_panda'"):
        runner(Bundle()).plan({0: observation(robot="libero_panda")})


def test_no_known_camera():
    with pytest.raises(ValueError, match="sees the cameras .*head.*found \\('front',\\)"):
        runner(Bundle()).plan({0: observation(images={"front": np.zeros((8, 8, 3), np.uint8)})})


def test_wrong_state():
    with pytest.raises(ValueError, match="state must have 8 dimensions"):
        runner(Bundle()).plan({0: observation(state=np.zeros(7, np.float32))})


def test_latencies_count_calls():
    policy = runner(Bundle(), slots=(0, 1))
    policy.plan({0: observation(), 1: observation()})
    policy.plan({1: observation()})
    assert len(policy.latencies) == 2
