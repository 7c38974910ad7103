"""The closed loop around a bundle, with a stand-in for the bundle."""

import collections
import dataclasses
import types
from collections.abc import Mapping

import numpy as np
import pytest
import synthetic
import toy_bundle

from jaxvp.config import build
from jaxvp.data import statistics, text_embeddings
from jaxvp.data.clips import Clips
from jaxvp.data.observation import describe
from jaxvp.data.rlds import Episodes
from jaxvp.data.spec import ClipSpec, Window, observe
from jaxvp.data.text import ByteTokenizer
from jaxvp.evaluation.rollout import rollouts
from jaxvp.evaluation.suites import tabletop
from jaxvp.policy.bundle import Manifest, save
from jaxvp.policy.runner import PolicyRunner


class Bundle(types.SimpleNamespace):
    """Answers with a ramp in every action, keeps what it was asked, and counts calls in its
    carry."""

    def __init__(self, **changes):
        values = toy_bundle.manifest(format_version=3, files={}, sha256="", **changes)
        super().__init__(manifest=build(Manifest, values), path="", calls=[])

    def initial_carry(self, rows):
        return {"calls": np.zeros((rows, 1), np.float32)}

    def predict(self, given, keys, wanted, carry):
        assert wanted == ("action",)
        self.calls.append((given, keys, np.asarray(carry["calls"])[:, 0].tolist()))
        spec = self.manifest.spec
        steps = np.linspace(-1, 1, spec.window.chunk, dtype=np.float32)
        action = np.broadcast_to(steps[:, None], (len(keys), len(steps), spec.action_size))
        return {"action": action}, {"calls": carry["calls"] + 1}


def observation(**changes):
    images = {camera: np.full((16, 16, 3), value, np.uint8)
              for camera, value in (("head", 10), ("left_wrist", 20), ("right_wrist", 30))}
    return {"images": images, "state": np.array([0.4, 0, 0.3, 0, 0, 0, 0, 1], np.float32),
            "instruction": "lift the tray", "robot": "tabletop", **changes}


def runner(bundle, seed=0, seen=(None,)):
    """A runner that has observed `seen` once, None for the usual, one slot each."""
    result = PolicyRunner(bundle, seed)
    for slot, each in enumerate(seen):
        result.reset(slot, "task", trial=slot)
        result.observe(slot, each or observation())
    return result


def test_the_first_part_of_a_chunk_in_si_units():
    bundle = Bundle(spec=toy_bundle.window(chunk=5), execution_horizon=3)
    actions = runner(bundle).act([0])[0]
    assert actions.shape == (3, 8) and actions.dtype == np.float32
    np.testing.assert_allclose(actions[:, 0], [-0.4, -0.2, 0.0], atol=1e-6)  # x in metres
    np.testing.assert_allclose(actions[:, 7], [0.0, 0.25, 0.5], atol=1e-6)  # gripper


def test_embedded_text_comes_with_the_bundle(tmp_path):
    seen = observation()
    text = describe(seen["robot"], toy_bundle.tabletop.CAMERA_TEXT, seen["instruction"])
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    text_embeddings.add(tmp_path / "made", [text], "toy", 4, lambda texts: [rows])
    spec = toy_bundle.spec(text_width=4, text_length=5)
    save(tmp_path / "bundle", toy_bundle.manifest(spec=spec), toy_bundle.PARAMS,
         {toy_bundle.ACT: b""}, tmp_path / "made")
    bundle = Bundle(spec=spec)
    bundle.path = tmp_path / "bundle"
    policy = runner(bundle, seen=(seen, observation(instruction="fold the towel")))
    found = policy.given([0])["text"]
    assert found.shape == (1, 5, 4) and found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found[0].astype(np.float32), [*rows, [0] * 4, [0] * 4])
    with pytest.raises(ValueError, match="no embedding of the text.*fold the towel"):
        policy.act([1])


def test_what_is_given_are_the_arrays_of_an_observation():
    given = runner(Bundle(), seen=(None, observation(instruction="x"))).given([0, 1])
    assert {name: (v.shape[1:], v.dtype) for name, v in given.items()} == (
        toy_bundle.SPEC.observation)
    assert all(len(v) == 2 for v in given.values())
    np.testing.assert_array_equal(given["video"][0, :, 0, 3, 3, 1], [10, 20, 30])
    np.testing.assert_allclose(given["state"][0, 0], [1, 0, 1, -1, 0, 0, -1, 1], atol=1e-6)
    text = ByteTokenizer(toy_bundle.SPEC.text_length).decode(given["text"][0])
    assert text == "tabletop; one head camera and two wrist cameras; lift the tray"
    assert given["view_mask"].all() and given["state_mask"].all() and given["frame_mask"].all()


def test_white_space_in_an_instruction_makes_no_other_tokens():
    texts = " lift  the\ttray\n", "lift the tray"
    ragged, clean = runner(Bundle(), seen=[observation(instruction=text) for text in texts]).given(
        [0, 1])["text"]
    np.testing.assert_array_equal(ragged, clean)


def test_images_of_another_size():
    images = {"head": np.repeat([[[0], [200]]], 64, 0).repeat(32, 1).repeat(3, 2).astype(np.uint8)}
    video = runner(Bundle(), seen=[observation(images=images)]).given([0])["video"][0, 0, 0]
    assert video.shape == (16, 16, 3) and (video[:, 0] == 0).all() and (video[:, 15] == 200).all()
    bundle = Bundle(spec=toy_bundle.spec(source_size=(32, 24)))
    assert runner(bundle).given([0])["video"].shape == (1, 3, 1, 32, 24, 3)


def test_missing_cameras_are_masked_and_grey():
    images = {"right_wrist": np.zeros((16, 16, 3), np.uint8)}
    given = runner(Bundle(cameras=["head", None, "right_wrist"]),
                   seen=(None, observation(images=images))).given([0, 1])
    np.testing.assert_array_equal(given["view_mask"], [[True, False, True], [False, False, True]])
    assert (given["video"][0, 1] == 127).all() and (given["video"][1, 0] == 127).all()


def test_padded_dimensions_and_no_state():
    given = runner(Bundle(state=None, spec=toy_bundle.spec(state_size=3))).given([0])
    assert not given["state_mask"].any() and given["state"].shape == (1, 1, 3)
    assert runner(Bundle(spec=toy_bundle.spec(action_size=12))).act([0])[0].shape[1] == 8


def test_noise_depends_on_seed_task_trial_and_step_only():
    def keys(seed=0, task="task", trial=1, steps=0, others=()):
        bundle = Bundle()
        policy = runner(bundle, seed, [None] * len(others))
        policy.reset(7, task, trial)
        policy.observe(7, observation())
        for _ in range(steps):
            policy.observe(7, observation(), np.zeros(8))
        policy.act([*others, 7])
        return tuple(bundle.calls[-1][1][-1])

    reference = keys()
    assert keys(others=(0, 1, 2)) == reference
    different = {keys(seed=1), keys(task="other"), keys(trial=2), keys(steps=4), reference}
    assert len(different) == 5


def test_the_carry_of_a_slot_follows_it_and_ends_with_its_episode():
    bundle = Bundle()
    policy = runner(bundle, seen=(None, None))
    for slots in ([0, 1], [1], [1, 0]):
        policy.act(slots)
    policy.reset(1)
    policy.observe(1, observation())
    policy.act([0, 1])
    assert [calls for _, _, calls in bundle.calls] == [[0, 0], [1], [2, 1], [2, 0]]


def test_other_robot():
    policy = runner(Bundle(), seen=[observation(robot="libero_panda")])
    with pytest.raises(ValueError, match="trained for the robot 'tabletop'.*'libero_panda'"):
        policy.act([0])


def test_no_known_camera():
    policy = runner(Bundle(), seen=[observation(images={"front": np.zeros((8, 8, 3), np.uint8)})])
    with pytest.raises(ValueError, match="sees the cameras .*head.*found \\('front',\\)"):
        policy.act([0])


def test_wrong_state():
    policy = runner(Bundle(), seen=[observation(state=np.zeros(7, np.float32))])
    with pytest.raises(ValueError, match="state must have 8 dimensions"):
        policy.act([0])


def test_latencies_count_calls():
    policy = runner(Bundle(), seen=(None, None))
    policy.act([0, 1])
    policy.act([1])
    assert len(policy.latencies["act"]) == 2


# -- What the window sees of the past --------------------------------------------------------------

class Lazy(Mapping):
    """Images that are rendered when they are read, before the next step: as LIBERO's."""

    def __init__(self, images, env):
        self.images, self.env, self.step = images, env, env["step"]

    def __getitem__(self, camera):
        if self.env["step"] != self.step:
            raise RuntimeError(f"step {self.step} is over")
        self.env["rendered"][self.step] += camera == "head"
        return self.images[camera]

    def __iter__(self):
        return iter(self.images)

    def __len__(self):
        return len(self.images)


def rendered(steps, horizon, **window):
    """{step: how often its head camera was read} of a closed loop that ends after some steps."""
    spec = toy_bundle.window(**window)
    policy = PolicyRunner(Bundle(spec=spec, execution_horizon=horizon))
    env = {"step": 0, "rendered": collections.Counter()}
    policy.reset(0)
    looks = policy.looks(0, 1)
    for step in range(steps):
        env["step"] = step
        seen = observation(images=Lazy(observation()["images"], env))
        policy.observe(0, seen, np.zeros(8) if step else None)
        if step % horizon == 0:
            policy.act([0])
            looks += [step + 1 + k for k in policy.looks(0, horizon)]
    assert {step for step in looks if step < steps} == set(env["rendered"])  # It said so before.
    return set(env["rendered"])


def test_images_are_read_only_where_a_frame_is_wanted():
    assert rendered(12, 4) == {0, 4, 8}  # As they were asked for, nothing else.
    # 5 frames a second of 10 steps: acting at 4, the frames of 0, 2 and 4 are wanted.
    assert rendered(12, 4, past=3) == {0, 2, 4, 6, 8, 10}
    # Acting at 5 reads the frames of 3 and 5; a call at 15 reads that of 13.
    assert rendered(12, 5, past=2) == {0, 3, 5, 8, 10}
    assert rendered(14, 5, past=2) == {0, 3, 5, 8, 10, 13}


@pytest.mark.parametrize(("horizon", "max_steps"), [(4, 8), (4, 6), (3, 8)])
def test_a_policy_that_sees_what_was_goes_to_the_end_of_an_episode(horizon, max_steps):
    """Nobody rendered how it ended, though a later call would have looked there."""
    suite = tabletop.TabletopSuite("tabletop", image_size=16)
    protocol = dataclasses.replace(suite.protocol, tasks=("lift_tray",), trials=2,
                                   max_steps=max_steps)
    policy = PolicyRunner(Bundle(spec=toy_bundle.window(fps=5.0, past=3),
                                 execution_horizon=horizon))
    found = list(rollouts(suite, protocol, policy, num_envs=2))
    assert [episode.steps for episode in found] == [max_steps] * 2


def test_a_robot_that_is_gone_is_forgotten():
    policy = runner(Bundle(), seen=(None, None))
    policy.forget(0)
    policy.forget(0)
    assert list(policy.act([1])) == [1]
    with pytest.raises(KeyError):
        policy.act([0])


class Imagining(Bundle):
    """Predicts frames that tell by which call, and which they are."""

    def predict(self, given, keys, wanted, carry):
        if "video" not in wanted:
            return super().predict(given, keys, wanted, carry)
        assert len(keys) == len(given["video"]) == len(carry["calls"])
        self.wanted = wanted
        frames = self.manifest.spec.window.frames
        video = np.zeros((len(keys), frames, 4, 4, 3), np.uint8)
        video += np.arange(frames, dtype=np.uint8)[:, None, None, None]
        return {"video": video + 10 * np.uint8(carry["calls"])[:, :, None, None, None]}, None


def test_imagined_video_is_that_of_the_call_before():
    # A frame every second step, one before now; a call every fourth step.
    bundle = Imagining(spec=toy_bundle.window(past=2, future=3, chunk=6), execution_horizon=4,
                       modes=(toy_bundle.ACT, toy_bundle.IMAGINE, toy_bundle.BOTH))
    policy = PolicyRunner(bundle)
    for slot in (0, 1):
        policy.reset(slot)
    for step in range(9):
        for slot in (0, 1):
            policy.observe(slot, observation(), np.zeros(8) if step else None)
        if step % 4 == 0:
            policy.act([0, 1], imagine=[1])
    found = policy.imagined(1, [0, 1, 2, 4, 6, 8, 9])
    assert found.shape == (7, 4, 4, 3) and bundle.wanted == ("action", "video")
    assert found[:, 0, 0, 0].tolist() == [1, 1, 2, 3, 12, 13, 21]
    assert policy.imagined(0, [0, 1]) is None
    assert {stage: len(calls) for stage, calls in policy.latencies.items()} == {
        "preprocess": 3, "act": 3}
    policy.reset(1)
    assert policy.imagined(1, [0]) is None


def test_a_policy_without_video_imagines_nothing():
    bundle = Bundle(modes=(toy_bundle.ACT,))
    policy = runner(bundle)
    policy.act([0], imagine=[0])
    assert policy.imagined(0, [0]) is None and len(bundle.calls) == 1


def test_cameras_are_those_that_the_robot_has():
    assert runner(Bundle(cameras=["head", None, "right_wrist"])).cameras == ("head", "right_wrist")


def test_a_robot_may_act_at_any_time():
    """Its images do not expire."""
    policy = PolicyRunner(Bundle(spec=toy_bundle.window(past=2)))
    policy.reset(0)
    for step in range(4):
        images = {"head": np.full((16, 16, 3), step, np.uint8)}
        policy.observe(0, observation(images=images))
    assert policy.given([0])["video"][0, 0, :, 0, 0, 0].tolist() == [1, 3]


@pytest.mark.parametrize("fps, window, horizon", [
    (10.0, Window(fps=10.0, past=1, past_actions=2, chunk=6), 4),
    (10.0, Window(fps=4.0, past=3, past_actions=5, chunk=6), 4),
    (29.97, Window(fps=8.0, past=4, chunk=6), 1),
    (15.0, Window(fps=6.0, past=2, future=2, past_actions=1, chunk=6), 3),
])
def test_a_policy_sees_what_it_was_trained_on(tmp_path, fps, window, horizon):
    """The clip at every step of an episode, cut off at now, and what a runner gives that is told
    the same episode: equal, its beginning too."""
    folder = synthetic.write(tmp_path, lengths=(13,), fps=fps)
    episodes = Episodes(folder, "train")
    normalizers = statistics.of_sources("min_max", [episodes])
    spec = ClipSpec(cameras=tuple(synthetic.VIEWS), window=window, height=16, width=16,
                    text_length=64, action_size=4, state_size=3)
    clips = Clips(episodes, spec, source=0, layout="bimanual", normalizers=normalizers)
    normalizer = normalizers["test robot"].to_dict()
    policy = PolicyRunner(Bundle(
        spec=dataclasses.asdict(spec), fps=float(episodes.fps[0]), execution_horizon=horizon,
        robot="test robot", camera_text="three views", action=normalizer["action"],
        state=normalizer["state"], normalization=normalizer["mode"]))
    record, env = episodes[0], {"step": 0, "rendered": collections.Counter()}
    policy.reset(0)
    for now in range(13):
        shown = clips[now]["video"][:, window.past - 1]  # As they are stored.
        env["step"] = now
        images = Lazy(dict(zip(spec.cameras, shown, strict=True)), env)
        policy.observe(0, {"images": images, "state": record.state[now], "robot": "test robot",
                           "instruction": record.instruction[now].decode()},
                       record.action[now - 1] if now else None)
        if now % horizon:
            continue
        batch = {name: value[None] for name, value in clips[now].items()}
        expected, found = observe(batch, window), policy.given([0])
        assert found.keys() == expected.keys() == spec.observation.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} at step {now}")
        policy.act([0])


def test_actions_that_nobody_knows_are_masked():
    policy = PolicyRunner(Bundle(spec=toy_bundle.window(past_actions=3)))
    policy.reset(0)
    for step, action in enumerate((None, None, np.full(8, 0.3))):
        policy.observe(0, observation(), action)
        if not step:
            assert not policy.given([0])["action"].any()
    given = policy.given([0])
    assert given["action_mask"][0].any(1).tolist() == [False, False, True]
    assert (given["action"][0] != 0).any(1).tolist() == [False, False, True]
