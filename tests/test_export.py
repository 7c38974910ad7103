"""From a workdir to a bundle: modes, merged workdirs, changed options, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_bundle

from jaxvp import checkpoint, export
from jaxvp import config as config_lib
from jaxvp import step as step_lib
from jaxvp.config import ConfigError
from jaxvp.data.normalize import Normalizer
from jaxvp.data.spec import Window
from jaxvp.errors import UserError
from jaxvp.methods import base
from jaxvp.policy import bundle
from jaxvp.policy.runner import PolicyRunner

SPEC = dataclasses.replace(toy_bundle.SPEC, window=Window(fps=5.0, past=1, future=2, chunk=4),
                           text_length=80)
VIDEO = {"transformer": {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "unroll": 1},
         "text": {"width": 8, "heads": 2}, "steps": 2}
METHODS = {
    "video_policy": {"video": VIDEO, "head": {"width": 16, "layers": 1, "heads": 2},
                     "taps": (0, 1)},
    "toy": {"name": f"{__name__}:Toy"}}
METHODS["vpp"] = METHODS["video_policy"] | {"action_steps": 2}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Toy(base.Method):
    """An encoder without actions, a head on it, and what it remembers: the sum of what it saw."""

    modes = ((("observation",), ("action",)), (("observation", "action"), ("state",)))
    width: int = 3
    scale: float = 1.0
    first: float = 0.0
    forgets: bool = False

    @property
    def stages(self):
        without = dataclasses.replace(self.spec.window, chunk=0)
        return {"look": base.Stage(trains=("encoder",), reads=("unused",), window=without),
                "act": base.Stage(trains=("head",), window=self.spec.window),
                "peek": base.Stage(trains=("encoder",), reads=("head",), window=without),
                "both": base.Stage(trains=("head", "encoder"), window=self.spec.window)}

    def init(self, part, key):
        shape = {"encoder": (self.width,), "head": (self.width, self.spec.action_size),
                 "unused": (5,)}[part]
        return {"w": jax.random.normal(key, shape)}

    def initial_carry(self, batch):
        return {"seen": jnp.full((batch, 1), self.first)}

    def predict(self, params, given, keys, wanted, carry):
        if wanted == ("state",):
            return {"state": given["state"] + given["action"].sum()}, carry
        light = given["video"].astype(jnp.float32).mean((1, 2, 3, 4, 5))[:, None] / 255
        carry = {"seen": carry["seen"] + light}
        action = jnp.tanh(carry["seen"] * params["encoder"]["w"] @ params["head"]["w"])
        chunk = jnp.repeat(self.scale * action[:, None], self.spec.window.chunk, axis=1)
        return {"action": chunk}, {} if self.forgets else carry


def write(workdir, method, stage, spec=SPEC, statistics=None, seed=0, options=None, **changes):
    """The checkpoint of a run that has not learned anything, without any data."""
    statistics = statistics or toy_bundle.statistics()
    data = {"sources": ({"path": "nowhere"},), "window": dataclasses.asdict(spec.window),
            "image_size": 16, "text_length": 80, **changes.pop("data", {})}
    config = {"method": {"name": method, **METHODS[method], **(options or {})},
              "stage": stage, "execution_horizon": 2, "data": data, "steps": 1, "batch_size": 8,
              "seed": seed, "optimizer": {"learning_rate": 1e-3}, **changes}
    built = config_lib.build(step_lib.TrainConfig, config, "config")
    made, rng = step_lib.make_method(built, spec), np.random.default_rng(seed)
    # Random everywhere: at the start of a run, the last layers are zero.
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
        {part: jax.eval_shape(functools.partial(made.init, part), jax.random.key(0))
         for part in made.stages[stage].parts})
    params = {part: values for part, values in params.items() if values}
    ema = {part: jax.tree.map(lambda x: x + 1, params[part]) for part in made.stages[stage].trains}
    state = {"params": params, "ema": ema, "opt_state": {"count": np.zeros(3)}}
    embodiment = {"camera_text": "cameras", "fps": 10.0, "cameras": list(spec.cameras),
                  "options": {"image_size": 16, "seed": 3}}
    normalizer = Normalizer.from_dict({"action": statistics, "state": statistics,
                                       "mode": "min_max"})
    assets = checkpoint.run_assets(config, spec, {"tabletop": normalizer},
                                   {"tabletop": embodiment})
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(3, state, data={}, assets=assets)
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method and stage to a workdir."""
    folder = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda method, stage: write(folder / f"{method}_{stage}", method, stage))


@pytest.fixture(scope="module")
def bundles(runs, tmp_path_factory):
    """Method to its loaded bundle, of the stage that trains the action head."""
    @functools.cache
    def make(method):
        out = tmp_path_factory.mktemp("bundles") / method
        export.export([runs(method, "action")], out, batch_size=2)
        return bundle.load(out)
    return make


def keys(rows):
    return np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2)


def predicted(policy, wanted, rows=3):
    return policy.predict(toy_bundle.observation(rows, spec=policy.manifest.spec), keys(rows),
                          wanted, policy.initial_carry(rows))[0]


@pytest.mark.parametrize("method", ["vpp", "video_policy"])
def test_one_function_per_mode_and_one_draw(runs, bundles, method):
    policy, workdir = bundles(method), runs(method, "action")
    assert sorted(path.name for path in policy.path.glob("*.stablehlo")) == [
        "observation-action+video.stablehlo", "observation-action.stablehlo",
        "observation-video.stablehlo"]
    both, action, video = (predicted(policy, wanted) for wanted in (
        ("action", "video"), ("action",), ("video",)))
    np.testing.assert_allclose(both["action"], action["action"], atol=1e-5)
    assert both["video"].shape == video["video"].shape == (3, 3, 24, 16, 3)
    assert both["video"].std() > 1 and action["action"].std() > 0.01
    np.testing.assert_allclose(both["video"].astype(int), video["video"], atol=1)

    # And as the method itself predicts.
    _, config, spec = export.read_assets(workdir)
    made = step_lib.make_method(config, spec)
    params, given = checkpoint.restore_params(workdir), toy_bundle.observation(3, spec=spec)
    expected = jax.jit(made.predict, static_argnums=3)(
        params, given, jax.random.wrap_key_data(keys(3)), ("action",), {})[0]["action"]
    np.testing.assert_allclose(action["action"], expected, atol=1e-5)


def test_what_policy_json_says(bundles):
    manifest = bundles("vpp").manifest
    assert manifest.spec == SPEC and manifest.modes == (
        toy_bundle.ACT, toy_bundle.IMAGINE, toy_bundle.BOTH)
    assert (manifest.method, manifest.stage, manifest.step) == ("vpp", "action", 3)
    assert manifest.protocol == {"image_size": 16} and manifest.execution_horizon == 2
    assert manifest.acting == toy_bundle.ACT


def test_a_runner_acts(bundles):
    policy = PolicyRunner(bundles("video_policy"))
    policy.reset(0)
    images = {camera: np.full((16, 16, 3), 90, np.uint8) for camera in SPEC.cameras}
    policy.observe(0, {"images": images, "state": np.zeros(8), "instruction": "lift the tray",
                       "robot": "tabletop"})
    assert policy.act([0])[0].shape == (2, 8)


def test_a_stage_that_gives_no_policy(runs, tmp_path):
    message = ("stage 'video', which gives no policy: action is not trained. Train it with "
               r"config.stage one of \['action', 'joint'\] and config.init_from\['\*'\]=")
    with pytest.raises(UserError, match=message):
        export.export([runs("vpp", "video")], tmp_path / "bundle", 2)
    assert not (tmp_path / "bundle").exists()


def test_a_head_at_random_is_refused(runs, tmp_path):
    """It is there, but neither this stage has trained it, nor the run that it comes from."""
    with pytest.raises(UserError, match="stage 'peek', .*: head is not trained. .*'act', 'both'"):
        export.export([runs("toy", "peek")], tmp_path / "bundle", 2)
    for sources in ({"head": "before"}, {"*": "before"}):
        name = next(iter(sources)).replace("*", "all")
        workdir = write(tmp_path / f"run_{name}", "toy", "peek", init_from=sources)
        export.export([workdir], tmp_path / f"bundle_{name}", 2)


def test_the_first_workdir_that_has_a_part_counts(runs, tmp_path):
    look, act = runs("toy", "look"), write(tmp_path / "act", "toy", "act", seed=7)
    both = write(tmp_path / "both", "toy", "both", seed=9)
    with pytest.raises(UserError, match="act is of the stage 'act', .*: encoder is not trained"):
        export.export([act], tmp_path / "bundle", 2)

    def parts(*workdirs):
        out = tmp_path / "-".join(path.name for path in workdirs)
        export.export(workdirs, out, 2)
        policy = bundle.load(out)
        return policy.manifest.stage, {
            part: np.asarray(leaves["w"]) for part, leaves in policy.params.items()}

    trained = {path.name: checkpoint.restore_params(path) for path in (look, act, both)}
    for order, owners, stages in (
            ((look, act), (look, act), "look+act"), ((act, look), (look, act), "act+look"),
            ((act, both), (both, act), "act+both"), ((both, act), (both, both), "both")):
        stage, found = parts(*order)
        assert stage == stages and found.keys() == {"encoder", "head"}  # No mode reads "unused".
        for part, owner in zip(("encoder", "head"), owners, strict=True):
            np.testing.assert_array_equal(found[part], trained[owner.name][part]["w"])


def test_statistics_of_merged_workdirs(runs, tmp_path):
    """They count where actions are seen; two of them must agree."""
    other = toy_bundle.statistics() | {"max": [0.9] * 8}
    look = write(tmp_path / "look", "toy", "look", statistics=other)
    export.export([look, runs("toy", "act")], tmp_path / "bundle", 2)
    found = bundle.read_manifest(tmp_path / "bundle").action
    assert found.max == tuple(toy_bundle.statistics()["max"])
    act = write(tmp_path / "act", "toy", "act", statistics=other)
    with pytest.raises(UserError, match="normalise 'tabletop' by different statistics"):
        export.export([act, runs("toy", "both")], tmp_path / "no", 2)


def test_other_modes_and_the_carry(runs, tmp_path):
    export.export([runs("toy", "both")], tmp_path / "bundle", 2)
    policy = bundle.load(tmp_path / "bundle")
    given, carry = toy_bundle.observation(3, spec=SPEC), policy.initial_carry(3)
    for calls in (1, 2):
        outputs, carry = policy.predict(given, keys(3), ("action",), carry)
        light = given["video"].mean((1, 2, 3, 4, 5)) / 255
        np.testing.assert_allclose(carry["seen"][:, 0], calls * light, rtol=1e-5)
    given["action"] = np.ones((3, *SPEC.arrays["action"][0]), np.float32)
    state = policy.predict(given, keys(3), ("state",), carry)[0]["state"]
    assert state.shape == given["state"].shape


@pytest.mark.parametrize("options, message", [
    ({"first": 1.0}, "initial_carry must be zeros"),
    ({"forgets": True}, "made the carry .*seen.* to {}"),
])
def test_a_method_that_breaks_its_promise_is_a_bug(tmp_path, options, message):
    workdir = write(tmp_path / "run", "toy", "both", options=options)
    with pytest.raises(ValueError, match=message) as caught:
        export.export([workdir], tmp_path / "bundle", 2)
    assert not isinstance(caught.value, UserError)


def test_options_that_change_no_parameter(runs, bundles, tmp_path):
    changes = {"execution_horizon": "3", "method.video.steps": "3", "method.video.guidance": "2",
               "method.video.sampler": "unipc"}
    export.export([runs("video_policy", "action")], tmp_path / "bundle", 2, changes=changes)
    policy = bundle.load(tmp_path / "bundle")
    assert policy.manifest.execution_horizon == 3
    video = policy.manifest.config["method"]["video"]
    assert (video["steps"], video["guidance"], video["sampler"]) == (3, 2, "unipc")
    action, before = (predicted(p, ("action",))["action"]
                      for p in (policy, bundles("video_policy")))
    assert np.abs(action - before).max() > 1e-3


@pytest.mark.parametrize("key, value, message", [
    ("method.video.stepps", "4", r"config.method.video.stepps does not exist. Did you mean "
                                 r"config.method.video.steps\?"),
    ("method.vidoe.steps", "4", "config.method.vidoe does not exist. Did you mean"),
    ("method.video.steps", "many", "config.method.video.steps: expected int, found 'many'"),
    ("method.video.steps.more", "1", "config has no such key, steps is 2"),
    ("method.name", "vpp", "an export changes config.execution_horizon and options of the method"),
    ("steps", "4", "--config.steps: an export changes config.execution_horizon and options"),
    ("data.crop", "0.5", "--config.data.crop: an export changes"),
    ("execution_horizon", "9", "expected at most config.data.window.chunk = 4"),
    ("method.video.transformer.ffn", "64",
     "--config.method.video.transformer.ffn=64: an export changes no parameter, but video/.* would "
     r"be \(.*64.*\), not \(.*32"),
])
def test_a_change_that_does_not_fit(runs, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        export.export([runs("video_policy", "action")], tmp_path / "bundle", 2,
                      changes={key: value})
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()


def test_flags_that_change_the_config():
    rest, changes = export.split(["export", "--workdir=a,b", "--config.method.video.steps=4",
                                  "-config.execution_horizon=2", "--config.x", "--configs.y=1"])
    assert rest == ["export", "--workdir=a,b", "--config.x", "--configs.y=1"]
    assert changes == {"method.video.steps": "4", "execution_horizon": "2"}


def test_which_robot(runs, tmp_path):
    with pytest.raises(UserError, match=r"--robot=aloha: .* the actions of \['tabletop'\]"):
        export.export([runs("toy", "both")], tmp_path / "bundle", 2, "aloha")


@pytest.mark.parametrize("absent", ["embodiments", "spec"])
def test_a_workdir_of_an_older_version(runs, tmp_path, monkeypatch, absent):
    assets = checkpoint.restore_json(runs("toy", "both"), "assets")
    monkeypatch.setattr(checkpoint, "restore_json", lambda *_: {
        name: value for name, value in assets.items() if name != absent} | {"step": 4})
    with pytest.raises(UserError, match=f"both was written by another version .*{absent}"):
        export.export([runs("toy", "both")], tmp_path / "bundle", 2)


def test_parameters_of_an_older_version(runs, tmp_path, monkeypatch):
    params = checkpoint.restore_params(runs("toy", "both"))
    params["head"]["bias"] = params["head"].pop("w")
    monkeypatch.setattr(checkpoint, "restore_params", lambda _: params)
    with pytest.raises(UserError, match=r"both was written by another version of jaxvp, with other "
                       r"parameters, such as head/bias: expected none, found \(3, 8\). Use that"):
        export.export([runs("toy", "both")], tmp_path / "bundle", 2)
    assert not (tmp_path / "bundle").exists()


def test_an_export_needs_an_empty_folder(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export.export([runs("toy", "both")], tmp_path, 2)
    with pytest.raises(NotADirectoryError):
        export.export([runs("toy", "both")], tmp_path / "notes.txt", 2)
    with pytest.raises(UserError, match="--batch_size must be at least 1, found 0"):
        export.export([runs("toy", "both")], tmp_path / "new", 0)


def test_a_policy_of_crops_sees_the_middle(tmp_path):
    """24 of 32 pixels; pictures come to it as large as they were loaded."""
    spec = dataclasses.replace(SPEC, source_size=(32, 32))
    workdir = write(tmp_path / "run", "toy", "both", spec, data={"crop": 0.75, "source_size": 32})
    export.export([workdir], tmp_path / "bundle", 2)
    policy = bundle.load(tmp_path / "bundle")
    assert policy.manifest.spec.source_size == (32, 32)
    given = toy_bundle.observation(2, spec=spec)
    given["video"][:] = 0
    given["video"][..., 4:28, 4:28, :] = 100
    carry = policy.predict(given, keys(2), ("action",), policy.initial_carry(2))[1]
    np.testing.assert_allclose(carry["seen"], 100 / 255, rtol=0.06)  # Of all, it would be 56.


def test_pictures_of_a_run_without_crops_come_as_small_as_it_sees_them(tmp_path):
    spec = dataclasses.replace(SPEC, source_size=(32, 32))
    workdir = write(tmp_path / "run", "toy", "both", spec, data={"source_size": 32})
    export.export([workdir], tmp_path / "bundle", 2)
    assert bundle.read_manifest(tmp_path / "bundle").spec == SPEC


def test_stored_arrays_are_not_observed(tmp_path):
    """A run on stored latents gives a policy that sees pictures."""
    spec = dataclasses.replace(SPEC, extra={"latents": (3, 6, 4, 48)}, video=False)
    export.export([write(tmp_path / "run", "toy", "both", spec)], tmp_path / "bundle", 2)
    assert bundle.read_manifest(tmp_path / "bundle").spec == SPEC
