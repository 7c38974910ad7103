"""The kinds of clients, and the conversions between their conventions and ours."""

import dataclasses

import numpy as np
import pytest
import served

from data_builders.aloha import aloha
from data_builders.calvin import calvin
from data_builders.open_x import datasets
from data_builders.robocasa import robocasa
from data_builders.robotwin import robotwin
from jaxvp.envs import libero
from jaxvp.evaluation import remote
from jaxvp.policy import protocols
from jaxvp.policy.protocols import CLIENTS, Translator, check_fit


def manifest_of(row: protocols.Client, **changes):
    """That of a policy that reads and does all that a client sends and takes, if its cameras are
    those of one of the layouts."""
    form = row.openpi or row.vla_eval
    cameras = list(form.cameras)[:1]
    stats = {column: served.statistics(getattr(row, column)) for column in ("action", "state")}
    spec = dataclasses.replace(served.manifest().spec, cameras=("agentview",),
                               action_size=len(row.action), state_size=len(row.state),
                               window=dataclasses.replace(served.manifest().spec.window, fps=3.0,
                                                          chunk=10))
    return served.manifest(**{
        "robot": row.robot or "any robot", "layout": "single", "cameras": cameras,
        "fps": row.fps or 20.0, "protocol": {}, "spec": dataclasses.asdict(spec), **stats,
        **changes})


def message_of(translator: Translator, row: protocols.Client, size: int) -> dict:
    """An observation with the numbers 0 .. 1 as state."""
    form, message = translator.form, {}
    shape = (3, 8, 8) if form.channels_first else (8, 8, 3)
    parts = np.array_split(np.linspace(0, 1, size), [size - 1] if len(form.state) > 1 else [])
    values = {key: np.full(shape, 9, np.uint8) for key in form.cameras.values()}
    values |= dict(zip(form.state, parts, strict=True)) | {form.prompt: "lift it"}
    for key, value in values.items():
        *outer, name = key.split(".")
        (message.setdefault(outer[0], {}) if outer else message)[name] = value
    return message


FORMS = [(kind, protocol) for kind, row in CLIENTS.items()
         for protocol in ("openpi", "vla_eval") if getattr(row, protocol)]


@pytest.mark.parametrize(("kind", "protocol"), FORMS)
def test_every_kind_can_be_served(kind, protocol):
    row = CLIENTS[kind]
    manifest = manifest_of(row)
    check_fit(kind, row, manifest)
    translator = Translator(row, getattr(row, protocol), manifest)
    message = message_of(translator, row, translator.form.state_size or len(row.state))
    seen = translator.observation(message)
    (image,) = seen["images"].values()
    assert image.shape == (8, 8, 3) and seen["instruction"] == "lift it"
    assert seen["state"].shape == (len(row.state),) and np.isfinite(seen["state"]).all()
    actions = translator.actions(np.zeros((5, len(row.action)), np.float32))
    assert actions.shape == (5, len(row.action)) and actions.dtype == np.float32


def test_names_are_those_of_the_datasets():
    builders = {
        "aloha": (aloha.ARMS, aloha.ARMS), "calvin": (calvin.STATE_NAMES, calvin.ACTION_NAMES),
        "robocasa": (robocasa.STATE_NAMES, robocasa.ACTION_NAMES),
        "libero": (libero.STATE_NAMES, libero.ACTION_NAMES)}
    for kind, (state, action) in builders.items():
        row = CLIENTS[kind]
        assert set(row.state) <= set(state) and set(row.action) <= set(action)
        assert set(action) <= {*row.action, *row.unused}
    for kind, name in (("simpler", "bridge_dataset"), ("simpler_google", "fractal20220817_data")):
        entry, row = datasets.DATASETS[name], CLIENTS[kind]
        assert row.robot == entry.robot and row.fps == entry.fps
        assert row.state == tuple(n for part in entry.state for n in part.names)
        assert row.action == tuple(n for part in entry.action for n in part.names)
    assert CLIENTS["robotwin"].robot == robotwin.ROBOTS["agilex"][0]
    assert set(CLIENTS["robotwin"].vla_eval.cameras) <= set(robotwin.CAMERAS)


def test_grippers():
    chunk = np.array([[0.0] * 6 + [1.0]], np.float32)  # Open.
    for kind, protocol, expected in (
            ("libero", "openpi", -1), ("libero", "vla_eval", -1), ("robocasa", "vla_eval", -1),
            ("calvin", "vla_eval", 1), ("simpler", "vla_eval", 1), ("simpler", "openpi", 1)):
        row = CLIENTS[kind]
        translator = Translator(row, getattr(row, protocol), manifest_of(row))
        assert translator.actions(chunk)[0, -1] == expected, kind
    droid = CLIENTS["droid"]
    translator = Translator(droid, droid.openpi, manifest_of(droid))
    message = message_of(translator, droid, 8)
    message["observation/gripper_position"] = 0.0  # DROID: open.
    assert translator.observation(message)["state"][-1] == 1
    assert translator.actions(np.ones((10, 8), np.float32))[0, -1] == 0


def test_actions_that_the_client_does_not_take_are_left_out():
    row = CLIENTS["robocasa"]
    names = robocasa.ACTION_NAMES[6:] + robocasa.ACTION_NAMES[:6]  # In another order.
    spec = dataclasses.asdict(dataclasses.replace(
        served.manifest().spec, cameras=("agentview",), action_size=12, state_size=9))
    manifest = manifest_of(row, action=served.statistics(names), spec=spec)
    check_fit("robocasa", row, manifest)
    found = Translator(row, row.vla_eval, manifest).actions(np.arange(12, dtype=float)[None])
    np.testing.assert_array_equal(found, [[6, 7, 8, 9, 10, 11, 1 - 2 * 0]])


def test_a_policy_may_read_a_part_of_the_state():
    row = CLIENTS["libero"]
    names = (row.state[7], row.state[0])
    manifest = manifest_of(row, state=served.statistics(names))
    translator = Translator(row, row.vla_eval, manifest)
    seen = translator.observation(message_of(translator, row, 8))
    np.testing.assert_allclose(seen["state"], [1, 0])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e10, -1e300])
def test_a_state_that_is_none(value):
    row = CLIENTS["libero"]
    translator = Translator(row, row.openpi, manifest_of(row))
    message = message_of(translator, row, 8) | {"observation/state": np.full(8, value)}
    with pytest.raises(ValueError, match="observation/state must be finite numbers"):
        translator.observation(message)


def test_rotations():
    def matrix(vector):
        angle = np.linalg.norm(vector)
        x, y, z = vector / angle
        skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew

    roll, pitch, yaw = 0.3, -0.5, 1.1
    axes = np.eye(3)
    expected = matrix(yaw * axes[2]) @ matrix(pitch * axes[1]) @ matrix(roll * axes[0])
    action = np.array([1, 2, 3, roll, pitch, yaw, 0.5])
    found = protocols.with_rotation_vector(action)
    np.testing.assert_allclose(matrix(found[3:6]), expected, atol=1e-9)
    np.testing.assert_array_equal(found[[0, 1, 2, 6]], action[[0, 1, 2, 6]])
    assert (protocols.with_rotation_vector(np.zeros(7)) == 0).all()
    # A hand that looks down, as Bridge counts, is not rotated.
    w, y = np.cos(np.pi / 4), np.sin(np.pi / 4)
    found = protocols.bridge_state(np.array([0.1, 0.2, 0.3, w, 0, y, 0, 0.7]))
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0, 0, 0, 0.7], atol=1e-9)
    turned = expected @ protocols.LOOKING_DOWN
    w = np.sqrt(1 + np.trace(turned)) / 2
    xyz = np.array([turned[2, 1] - turned[1, 2], turned[0, 2] - turned[2, 0],
                    turned[1, 0] - turned[0, 1]]) / (4 * w)
    found = protocols.bridge_state(np.array([0, 0, 0, w, *xyz, 1]))
    np.testing.assert_allclose(found[3:6], [roll, pitch, yaw], atol=1e-9)


@pytest.mark.parametrize(("kind", "protocol", "expected"), [
    ("simpler", "openpi", [0, 1, 2, 3, 4, 5, 7]), ("simpler_google", "openpi", [*range(7), -6]),
    ("simpler_google", "vla_eval", [0, 1, 2, 4, 5, 6, 3, 7]),
    ("calvin", "vla_eval", [*range(7), 4])])
def test_states_as_the_datasets_have_them(kind, protocol, expected):
    """Of a client that sends 0 to 7, whatever these mean."""
    form = getattr(CLIENTS[kind], protocol)
    np.testing.assert_array_equal(form.to_state(np.arange(8.0)), expected)


@pytest.mark.parametrize(("changes", "message"), [
    ({"robot": "WidowX 250 arm"}, "robot: the bundle has WidowX 250 arm"),
    ({"cameras": ["head"]}, "cameras: the bundle has .'head',., the client .'agentview', 'wrist'."),
    ({"protocol": {"rotation": "none"}}, "rotation of the images: the bundle has none.*180"),
    ({"state": served.statistics(["joint_1 [rad]"])}, "state: the bundle has .'joint_1 .rad.'"),
    ({"action": served.statistics(libero.ACTION_NAMES[:6])}, "actions: the bundle"),
    ({"action": served.statistics(["eef_delta_x [m]", *libero.ACTION_NAMES[1:]])}, "actions: the"),
    ({"fps": 10.0}, "actions per second: the bundle has 10.0, the client 20"),
])
def test_a_bundle_that_means_something_else_is_refused(changes, message):
    row = CLIENTS["libero"]
    with pytest.raises(ValueError, match=f"does not fit --client=libero: {message}"):
        check_fit("libero", row, manifest_of(row, **changes))


def test_droid_insists_on_ten_actions():
    row = CLIENTS["droid"]
    spec = manifest_of(row).spec
    short = dataclasses.replace(spec, window=dataclasses.replace(spec.window, chunk=9))
    with pytest.raises(ValueError, match="actions in a chunk: the bundle has 9, the client at lea"):
        check_fit("droid", row, manifest_of(row, spec=dataclasses.asdict(short)))


def test_remote_protocols_have_all_tasks():
    counts = {p.name: len(p.tasks) for p in (remote.ROBOCASA, remote.ROBOTWIN,
                                             remote.SIMPLER_WIDOWX, remote.SIMPLER_GOOGLE)}
    assert counts == {"robocasa-24": 24, "robotwin-2.0": 50, "simpler-widowx": 4,
                      "simpler-google": 6}
    for row in CLIENTS.values():
        if row.protocol:
            assert row.protocol.max_steps == max(row.protocol.task_max_steps.values())
            assert set(row.protocol.tasks) == set(row.protocol.to_dict()["task_max_steps"])
