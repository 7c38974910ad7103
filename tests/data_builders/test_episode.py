"""What every builder shares: filters, other rates, still steps, and episodes as RLDS records."""

import dataclasses
import json

import numpy as np
import pytest
from raw import jpeg, picture, seen

from data_builders import builder, episode, images, language
from jaxvp.errors import UserError


@pytest.mark.parametrize(("length", "fps", "wanted", "steps"), [
    (7, 30, 30, [0, 1, 2, 3, 4, 5, 6]),
    (3, 10, 50, [0, 1, 2]),
    (7, 30, 10, [0, 3, 6]),
    (6, 30, 10, [0, 3]),
    (8, 30, 20, [0, 2, 3, 5, 6]),
    (1, 30, 1, [0]),
    (30, 29.97, 9.99, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]),
    (9000, 30.002, 30, list(range(9000))),
])
def test_resampled(length, fps, wanted, steps):
    found = episode.resampled(length, fps, wanted)
    assert found.tolist() == steps and found.dtype == np.int64


@pytest.mark.parametrize("fps", [15, 30, 29.97, 50])
@pytest.mark.parametrize("wanted", [1, 4, 10, 14.9])
def test_resampled_steps_are_the_nearest_in_time(fps, wanted):
    for length in (1, 2, 50, 99):
        steps = episode.resampled(length, fps, wanted)
        times = np.arange(len(steps)) / wanted
        assert np.abs(steps / fps - times).max() <= 0.5001 / fps
        assert (np.diff(steps) > 0).all() and len(steps) / wanted >= (length - 1) / fps


def test_accumulated_actions_lead_from_step_to_step():
    """Changes add up, targets are the last one before the next step."""
    action = np.random.default_rng(0).normal(size=(11, 3))
    steps, relative = np.array([1, 2, 5, 9]), [True, False, True]
    found = episode.accumulate(action, steps, relative)
    for row, (start, end) in zip(found, [(1, 2), (2, 5), (5, 9), (9, 11)], strict=True):
        np.testing.assert_allclose(row[[0, 2]], action[start:end].sum(0)[[0, 2]])
        assert row[1] == action[end - 1, 1]
    np.testing.assert_array_equal(episode.accumulate(action, steps), action[[1, 4, 8, 10]])
    np.testing.assert_array_equal(episode.accumulate(action, np.arange(11), relative), action)


def openvla_moving(action):
    """The rule of OpenVLA's regenerate_libero_dataset.py: is_noop against the last kept action."""
    kept = []
    for step in action:
        still = np.linalg.norm(step[:-1]) < 1e-4
        if kept:
            still = still and step[-1] == kept[-1][-1]
        if not still:
            kept.append(step)
        yield not still


def test_moving_is_openvlas_rule():
    rng = np.random.default_rng(0)
    relative = [True, True, False]
    for _ in range(50):
        action = rng.normal(size=(20, 3)) * rng.choice([0, 1e-5, 1], (20, 1))
        action[:, 2] = rng.integers(0, 2, 20)
        found = episode.moving(action, relative)
        assert found.dtype == bool and found.tolist() == list(openvla_moving(action))


def test_moving_targets():
    """The first is kept, then what differs from the last that is kept: slow motion is not lost."""
    target = np.array([0.5, 0.5, 0.50005, 0.50011, 0.50011, 0.7])[:, None].repeat(2, 1)
    assert episode.moving(target).tolist() == [True, False, False, True, False, True]
    assert episode.moving(np.zeros((3, 2)), [True, True]).tolist() == [False] * 3


def test_absolute_arms_move_on_a_base_that_stands():
    """ALOHA with wheels: joint targets, and changes of the base."""
    action = np.zeros((5, 4))
    action[2:, :2] = 0.5, 0.3
    action[4, 3] = 0.1
    relative = [False, False, True, True]
    assert episode.moving(action, relative).tolist() == [False, False, True, False, True]


def test_shortest():
    assert episode.shortest(states=9, video=9) == (9, ())
    assert episode.shortest(states=9, video=7) == (7, ("cut: the video ended first",))
    assert episode.shortest(states=5, video=10) == (5, ("cut: the states ended first",))
    with pytest.raises(ValueError, match="do not fit each other: {'states': 10, 'video': 4}"):
        episode.shortest(states=10, video=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raw(builder.RawBuilder):
    """A builder of nothing."""

    name = "raw"
    version = "1.0.0"

    def features(self):
        return episode.features({"head": (64, 64)}, ["x [m]"], ["x [m]"])

    def items(self):
        return []

    def build(self, item):
        yield from ()


def test_paths_that_are_not_there_say_what_is(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "videos" / name).mkdir(parents=True)
    raw = Raw(raw=str(tmp_path))
    assert raw.path("videos", "a") == tmp_path / "videos" / "a" and raw.path() == tmp_path
    with pytest.raises(UserError, match=r"--raw=.*there is no .*/videos/c/d.mp4; "
                                                r".*/videos has a, b\."):
        raw.path("videos", "c", "d.mp4")
    with pytest.raises(UserError, match=r"/videos/a has nothing\."):
        raw.path("videos", "a", "d.mp4")


def test_cameras_are_chosen_by_name():
    assert Raw(raw="x").view_names(["head", "wrist"]) == ("head", "wrist")
    assert Raw(raw="x", cameras=("wrist", "head")).view_names(["head", "wrist"]) == (
        "wrist", "head")
    with pytest.raises(ValueError, match="--cameras=hand: raw has head, wrist"):
        Raw(raw="x", cameras=("head", "hand")).view_names(["head", "wrist"])


def test_filters():
    raw = Raw(raw="x", min_views=2, min_seconds=1.5)
    raw.admit(15, 10, 2)
    for arguments, reason in (
        ((15, 10, 1), "fewer than 2 views"),
        ((14, 10, 2), "shorter than 1.5 s"),
        ((15, 10, 2, False), "not successful"),
    ):
        with pytest.raises(builder.Skip, match=reason):
            raw.admit(*arguments)
    with pytest.raises(ValueError, match="the episode has no steps"):
        raw.admit(0, 10, 2)
    Raw(raw="x", failed="keep").admit(1, 10, 1, False)
    ntsc = Raw(raw="x", min_seconds=128 / 29.97)  # 1e-6 more than 128 frames of it last.
    ntsc.admit(128, 30000 / 1001, 1)
    with pytest.raises(builder.Skip, match="shorter than 4.27094 s"):
        ntsc.admit(127, 30000 / 1001, 1)


def test_instructions():
    assert Raw(raw="x").instruction(b" go ") == "go"
    with pytest.raises(builder.Skip, match="no instruction"):
        Raw(raw="x").instruction(" none\n")
    assert Raw(raw="x", unlabelled="keep").instruction(None) == ""
    with pytest.raises(ValueError, match="not UTF-8"):
        Raw(raw="x", unlabelled="keep").instruction(b"\xff")


def test_a_step_without_an_instruction_is_no_episode_without():
    texts = [None, b" go  on ", " ", "nan", "stop"]
    for unlabelled in ("drop", "keep"):
        made = Raw(raw="x", unlabelled=unlabelled).instructions(texts)
        assert made == ["", "go on", "", "", "stop"]
    with pytest.raises(builder.Skip, match="no instruction"):
        Raw(raw="x").instructions([None, " ", b"None"])
    assert Raw(raw="x", unlabelled="keep").instructions([None, " "]) == ["", ""]


def test_of_several_instructions_an_empty_one_is_not_picked():
    picked = {language.pick(["", "a", " b\n", None, b"c"], f"{number}") for number in range(40)}
    assert picked == {"a", "b", "c"}
    assert [language.pick(texts, "x") for texts in (None, (), [" "], "go ")] == ["", "", "", "go"]


def test_kept_steps_and_rate():
    action = np.zeros((12, 2))
    action[6:, 0], action[:, 1] = 1e-3, 1.0
    assert Raw(raw="x").kept(12, 30, action, [True, False]).tolist() == list(range(12))
    slow = Raw(raw="x", fps=10)
    assert slow.kept(12, 30, action, [True, False]).tolist() == [0, 3, 6, 9]
    assert (slow.rate(30), slow.rate(5), Raw(raw="x").rate(30)) == (10, 5, 30)
    assert Raw(raw="x", fps=29.97).rate(30000 / 1001) == 30000 / 1001
    assert Raw(raw="x", fps=29.97).rate(30) == 29.97
    still = Raw(raw="x", fps=10, noops="drop")
    assert still.kept(12, 30, action, [True, False]).tolist() == [6, 9]
    assert still.kept(12, 30).tolist() == [0, 3, 6, 9], "without actions nothing is known"
    with pytest.raises(builder.Skip, match="nothing moves"):
        still.kept(12, 30, action * 0, [True, False])


def test_slow_motion_is_measured_at_the_rate_that_is_kept():
    """Three changes of 5e-5 are none at 30 steps per second, and one of 1.5e-4 at 10."""
    action = np.full((6, 1), 5e-5)
    assert Raw(raw="x", fps=10, noops="drop").kept(6, 30, action, [True]).tolist() == [0, 3]


def test_options_are_checked():
    with pytest.raises(ValueError, match="--fps: expected float >= 0, found -1"):
        Raw(raw="x", fps=-1)
    with pytest.raises(ValueError, match="--noops must be one of keep, drop, found 'no'"):
        Raw(raw="x", noops="no")


FEATURES = episode.features({"head": (8, 8), "wrist": (8, 8)}, ["x [m]"], ["x [m]"])


def made(**changes) -> episode.Episode:
    values = dict(
        dataset="toy",
        episode_id="e",
        robot="r",
        images={"head": np.zeros((4, 8, 8, 3), np.uint8)},
        camera_text="c",
        state=np.zeros((4, 1)),
        action=np.arange(4.0)[:, None],
        instruction="play",
        fps=5.0,
        source="s",
        options={"b": 1, "a": 2},
    )
    return episode.Episode(**values | changes)


def test_long_episodes_are_cut():
    frames = [jpeg(picture(step, 0, 8, 8)) for step in range(10)]
    records = made(
        images={"head": frames}, state=np.ones((10, 1)), action=np.arange(10.0)[:, None],
        instruction=[f"do {step}" for step in range(10)], max_steps=4).records(FEATURES)
    assert [len(record["steps"]["reward"]) for record in records] == [4, 3, 3]
    assert [record["episode_metadata"]["offset"] for record in records] == [0, 4, 7]
    steps = [record["steps"] for record in records]
    joined = {name: np.concatenate([part[name] for part in steps]) for name in (
        "action", "reward", "discount", "is_first", "is_last", "is_terminal",
        "language_instruction")}
    np.testing.assert_array_equal(joined["action"], np.arange(10, dtype=np.float32)[:, None])
    assert np.flatnonzero(joined["is_first"]).tolist() == [0, 4, 7]
    assert np.flatnonzero(joined["is_last"]).tolist() == [3, 6, 9]
    assert joined["reward"].tolist() == [0] * 9 + [1] == joined["is_terminal"].tolist()
    assert joined["language_instruction"].tolist() == [f"do {step}" for step in range(10)]
    assert sum((part["observation"]["head"] for part in steps), []) == frames


def test_a_failed_episode_has_no_reward():
    (record,) = made(success=False).records(FEATURES)
    assert not record["steps"]["reward"].any() and not record["steps"]["is_terminal"].any()
    assert record["steps"]["is_last"].tolist() == [False] * 3 + [True]


def test_metadata_and_a_camera_that_is_missing():
    """Its picture is grey, and the layout names the cameras that are there: readers mask it."""
    frames = np.stack([picture(step, 1, 8, 8) for step in range(4)])
    (record,) = made(images={"head": frames}).records(FEATURES)
    metadata, observation = record["episode_metadata"], record["steps"]["observation"]
    assert metadata["camera_layout"] == "head" and metadata["has_action"]
    assert json.loads(metadata["options"]) == {"a": 2, "b": 1} and metadata["fps"] == 5
    assert (images.decode(observation["wrist"][3]) == 127).all()
    assert [seen(images.decode(data))[0] for data in observation["head"]] == [0, 1, 2, 3]


def test_no_actions():
    features = episode.features({"head": (8, 8)}, [], None)
    (record,) = made(state=None, action=None).records(features)
    assert "action" not in record["steps"] and not record["episode_metadata"]["has_action"]
    assert list(record["steps"]["observation"]) == ["head"]
    (record,) = made(action=None).records(FEATURES)
    assert not record["steps"]["action"].any() and not record["episode_metadata"]["has_action"]


def test_sizes_may_differ_by_episode():
    features = episode.features({"head": (None, None)}, ["x [m]"], ["x [m]"])
    for size in (8, 24):
        frames = [jpeg(picture(0, 0, size, 16))] * 4
        (record,) = made(images={"head": frames}).records(features)
        assert images.decode(record["steps"]["observation"]["head"][0]).shape == (size, 16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.zeros((3, 1))}, "e: steps must be as many.*'state': 3"),
        ({"instruction": ["a"]}, "'instruction': 1"),
        ({"images": {"head": []}, "state": np.zeros((0, 1)), "action": np.zeros((0, 1))},
         "e: steps must be as many and some"),
        ({"action": np.array([[0], [1], [np.nan], [0]])},
         r"e: action must be finite float32\[L, 1\], found nan at step 2, dimension 0"),
        ({"state": np.full((4, 1), np.inf)}, "state must be finite .* found inf at step 0"),
        ({"action": np.zeros((4, 2))}, r"action must be finite float32\[L, 1\], found \(4, 2\)"),
        ({"state": None}, "state is in only one of episode and features"),
        ({"images": {"head": np.zeros((4, 9, 8, 3), np.uint8)}}, "camera head must be uint8"),
        ({"images": {"head": np.zeros((4, 8, 8, 3))}}, "camera head must be .* found float64"),
        ({"images": {"head": [jpeg(picture(0, 0, 8, 16))] * 4}},
         r"camera head must be \(8, 8\) pixels, found \(8, 16\)"),
        ({"images": {"head": [b"", b"", b"", b""]}}, "0 bytes are not an image"),
        ({"images": {"hand": np.zeros((4, 8, 8, 3), np.uint8)}}, "hand.*not in the features"),
        ({"images": {}}, "e: it has 0 cameras and 5.0 steps per second"),
        ({"fps": float("nan")}, "e: it has 1 cameras and nan steps per second"),
    ],
)
def test_inconsistent_episodes_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes).records(FEATURES)
