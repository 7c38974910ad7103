"""The command: from a bundle to results, and one clear error for what cannot work."""

import contextlib
import errno
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import rich.console
import toy_bundle

from jaxvp import evaluate
from jaxvp.data import observation, text_embeddings
from jaxvp.envs import tabletop
from jaxvp.errors import UserError
from jaxvp.evaluate import Settings
from jaxvp.evaluation import journal, suites
from jaxvp.policy import bundle as policy_bundle
from jaxvp.video import read_video

# Nothing that trains models is needed to run one.
BANNED = {"torch", "tensorflow", "flax", "optax", "grain", "tensorflow_datasets"}
COMMAND = f"""
import sys
from jaxvp import evaluate
try:
    evaluate.run()
finally:
    print("imported:", sorted({BANNED} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(toy_bundle.write(tmp_path_factory.mktemp("bundles") / "toy"))


def command(*flags):
    return subprocess.run([sys.executable, "-W", "error", "-c", COMMAND, *flags],
                          capture_output=True, text=True)


def run(**settings):
    prepared = evaluate.prepare(Settings(**settings))
    return evaluate.evaluate(prepared, prepared.make_policy(), rich.console.Console(quiet=True))


def test_command(bundle, tmp_path):
    out = tmp_path / "out"
    done = command(f"--bundle={bundle}", "--suite=tabletop", "--tasks=1,lift_tray", "--trials=2",
                   "--num_envs=3", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout and str(out / "report.html") in done.stdout
    assert done.stderr == ""
    found = json.loads((out / "results.json").read_text())
    assert [task["name"] for task in found["tasks"]] == ["lift_tray", "red_on_plate"]
    assert found["bundle"]["method"] == "toy" and found["policy"] == "bundle"
    assert found["protocol"]["camera_size"] == [32, 32]  # as the bundle asks for
    assert found["protocol"]["trials"] == 2 and found["latency"]["act"]["calls"] > 0
    for row in found["episodes"]:
        assert len(read_video(out / row["video"])) == row["steps"] + 1
        assert ("success" in row["video"]) == row["success"]
    assert (out / "report.html").read_text().count("<video ") == 8


def test_episodes_do_not_depend_on_workers_or_environments(bundle, tmp_path, monkeypatch):
    videos = {}  # As they are before they are encoded: the encoder does not repeat itself.
    monkeypatch.setattr(journal, "write_video", lambda path, video, fps: videos.update(
        {str(path): video.tobytes()}))

    def frames(workers, num_envs, **settings):
        out = tmp_path / f"{workers}_{num_envs}_{len(settings)}"
        found = run(bundle=bundle, tasks=("lift_tray",), trials=3, workers=workers,
                    num_envs=num_envs, out=str(out), **settings)
        return [(row["steps"], (out / row["trace"]).read_text(), videos[str(out / row["video"])])
                for row in found["episodes"]]

    alone = frames(0, 1)
    assert len({trace for _, trace, _ in alone}) == 3
    assert frames(1, 2) == alone and frames(2, 3) == alone
    assert frames(1, 3, imagined=0) == alone  # Predicting video changes no action.


def test_what_is_recorded_of_an_episode(bundle, tmp_path):
    found = run(bundle=bundle, tasks=("lift_tray",), trials=3, videos=2, imagined=1,
                out=str(tmp_path))
    first, second, third = found["episodes"]
    assert third["video"] is third["trace"] is second["imagined"] is third["imagined"] is None
    real, imagined = (read_video(tmp_path / first[name]) for name in ("video", "imagined"))
    assert len(real) == len(imagined) == first["steps"] + 1
    trace = json.loads((tmp_path / first["trace"]).read_text())
    steps = range(0, first["steps"], toy_bundle.HORIZON)
    assert trace["calls"] == list(steps)
    for name, column in (("action", found["protocol"]["action"]), ("state", tabletop.ACTION_NAMES)):
        assert trace[name]["names"] == list(column)
        assert np.shape(trace[name]["values"]) == (first["steps"], 8)
    assert first["restarts"] == 0 and first["wall_s"] > 0
    calls = found["latency"]["act"]["calls"]
    assert calls == found["latency"]["preprocess"]["calls"] >= len(steps)
    assert found["latency"]["simulator"]["calls"] == sum(r["steps"] for r in found["episodes"])
    assert set(found["latency"]["act"]) == {"calls", "mean_ms", "p50_ms", "p95_ms", "p99_ms"}


def test_an_evaluation_that_is_killed_goes_on(bundle, tmp_path):
    """A real process and a real SIGKILL in the middle."""
    settings = {"bundle": bundle, "suite": "tabletop_core", "trials": 5, "videos": 1}
    whole = run(**settings, out=str(tmp_path / "whole"))
    out, rows = tmp_path / "killed", tmp_path / "killed" / "episodes.jsonl"
    flags = [f"--{name}={value}" for name, value in (settings | {"out": out}).items()]
    with subprocess.Popen([sys.executable, "-m", "jaxvp.evaluate", *flags]) as process:
        while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    kept = rows.read_bytes()
    assert 3 <= kept.count(b"\n") < 10 and not (out / "results.json").exists()
    with pytest.raises(UserError, match="seed is 0 there and 1 now; protocol.trials is 5 there "
                                        "and 6 now"):
        evaluate.prepare(Settings(**settings | {"trials": 6, "seed": 1, "out": str(out)}))
    with rows.open("ab") as file:  # A kill may tear a line.
        file.write(b'{"task": "lift_tr')
    found = run(**settings, out=str(out), workers=1)
    assert rows.read_bytes().startswith(kept) and rows.read_bytes().count(b"\n") == 10
    assert found["tasks"] == whole["tasks"] and len(found["episodes"]) == 10
    for ours, theirs in zip(found["episodes"], whole["episodes"], strict=True):
        assert {**ours, "wall_s": 0} == {**theirs, "wall_s": 0}
        assert all((out / ours[name]).exists() for name in ("video", "imagined") if ours[name])
        assert not ours["trace"] or (out / ours["trace"]).read_text() == (
            tmp_path / "whole" / ours["trace"]).read_text()
    with pytest.raises(UserError, match="holds another result"):
        evaluate.prepare(Settings(**settings, out=str(out)))


@pytest.mark.parametrize("policy, rate", [("expert", 1), ("replay", 1), ("random", 0)])
def test_baselines(tmp_path, policy, rate):
    found = run(policy=policy, suite="tabletop", tasks=("0", "9"), trials=2, videos=0,
                out=str(tmp_path / "out"))
    assert found["success_rate"] == rate and found["bundle"] is None
    assert not (tmp_path / "out" / "videos").exists() and not found["latency"]["act"]
    assert found["latency"]["simulator"]["calls"] == sum(row["steps"] for row in found["episodes"])


def test_dry_run(bundle):
    done = command(f"--bundle={bundle}", "--dry_run", "--suite=tabletop",
                   "--tasks=hand_over_blue")
    assert done.returncode == 0, done.stderr
    assert "10 hand_over_blue: hand the blue block to the right plate" in done.stdout
    assert "max_steps" in done.stdout


@pytest.mark.parametrize("flags, message", [
    (["--suite=tabletopp"], "--suite: there is no 'tabletopp'. Did you mean 'tabletop'?"),
    (["--trails=10"], "Unknown command line flag 'trails'. Did you mean: trials"),
])
def test_command_says_what_is_wrong(flags, message):
    done = command("--policy=expert", "--out=unused", *flags)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("settings, message", [
    ({"policy": "experts"}, "--policy: there is no 'experts'. Did you mean 'expert'"),
    ({"policy": "bundle"}, "--bundle=DIR is missing"),
    ({"bundle": "nowhere", "policy": "bundle"}, "nowhere is not a policy bundle"),
    ({"bundle": "nowhere"}, "--policy=expert does not use --bundle=nowhere"),
    ({"out": None}, "--out=DIR is missing"),
    ({"trials": 0}, "--trials must be at least 1, found 0"),
    ({"num_envs": 0}, "--num_envs must be at least 1"),
    ({"videos": -1}, "--videos must be at least 0"),
    ({"workers": -1}, "--workers must be at least 0"),
    ({"step_timeout": 0.0}, "--step_timeout must be positive, found 0.0"),
    ({"episode_timeout": float("nan")}, "--episode_timeout must be positive, found nan"),
    ({"tasks": ["13"]}, "no task 13, the numbers are 0 to 12"),
    ({"tasks": ["lift_trai"]}, "--tasks: there is no 'lift_trai'. Did you mean 'lift_tray'"),
    ({"tasks": ["-1"]}, "--tasks: there is no '-1'"),
    ({"suite_flags": {"libero_demos": "x"}}, "--suite=tabletop does not use --libero_demos."),
])
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.prepare(Settings(**{"policy": "expert", "out": str(tmp_path), **settings}))


def test_rates_are_the_same_within_a_tolerance(tmp_path):
    """A rate may have come through float32."""
    policy_bundle.seal(tmp_path, toy_bundle.manifest(fps=10.00001))
    found = evaluate.prepare(Settings(bundle=str(tmp_path), out=str(tmp_path / "out")))
    assert found.manifest.fps == 10.00001 and found.protocol.fps == 10


@pytest.mark.parametrize("changes, message", [
    ({"robot": "aloha"}, "robot: the bundle has aloha, the suite tabletop"),
    ({"fps": 20.0}, "actions per second: the bundle has 20.0, the suite 10.0"),
    ({"fps": 10.01}, "actions per second: the bundle has 10.01, the suite 10.0"),
    ({"cameras": ["front", None, None]}, "cameras that are absent: .*front"),
    ({"action": {**toy_bundle.statistics(), "units": ["mm"] * 8}}, "actions: .*left_x \\[mm\\]"),
    ({"state": {**toy_bundle.statistics(), "names": list("abcdefgh")}}, "state: .*'a \\[m\\]'"),
    ({"spec": toy_bundle.spec(text_length=8)}, "raise text_length"),
    ({"protocol": {"rotation": "180"}}, "protocol.rotation does not exist.*: image_size"),
])
def test_bundle_of_something_else(tmp_path, changes, message):
    policy_bundle.seal(tmp_path, toy_bundle.manifest(**changes))
    with pytest.raises(ValueError, match=message):
        evaluate.prepare(Settings(bundle=str(tmp_path), out=str(tmp_path / "out")))


@pytest.mark.parametrize("texts, tokens, length, message", [
    (1, 20, 64, None),  # The text has 62 bytes and more.
    (1, 20, 20, None),
    (1, 70, 64, "The text has 70 tokens, text_length is 64"),
    (0, 20, 512, "no embedding of 13 of the 13 texts of --suite=tabletop, such as .*lift the tray"),
])
def test_embedded_texts_are_looked_up(tmp_path, texts, tokens, length, message):
    suite = suites.make("tabletop", {}, {})
    said = [observation.describe(tabletop.ROBOT, tabletop.CAMERA_TEXT, suite.instruction(task))
            for task in suite.protocol.tasks]
    text_embeddings.add(tmp_path / "text_embeddings", ["", *said * texts], "encoder", 4,
                        lambda texts: [np.ones((tokens, 4), np.float32)] * len(texts))
    policy_bundle.seal(tmp_path, toy_bundle.manifest(
        spec=toy_bundle.spec(text_width=4, text_length=length)))
    settings = Settings(bundle=str(tmp_path), dry_run=True)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        evaluate.prepare(settings)


def test_damaged_embeddings(tmp_path):
    text_embeddings.add(tmp_path / "text_embeddings", [""], "encoder", 4,
                        lambda texts: [np.ones((3, 4), np.float32)] * len(texts))
    policy_bundle.seal(tmp_path, toy_bundle.manifest(spec=toy_bundle.spec(text_width=4)))
    (tmp_path / "text_embeddings" / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json is damaged"):
        evaluate.prepare(Settings(bundle=str(tmp_path), dry_run=True))


def test_names_that_look_like_markup(bundle, tmp_path):
    """Before the episodes nothing is printed of them, after them it would be too late."""
    out = tmp_path / "a[" / "b]:bear:[/c]"
    done = command(f"--bundle={bundle}", "--tasks=0", "--trials=1", "--videos=0", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"{out}/report.html" in done.stdout and (out / "results.json").exists()


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/out"])
def test_a_folder_that_cannot_be_written_to(tmp_path, out):
    (tmp_path / "file").write_text("")
    done = command("--policy=expert", f"--out={tmp_path / out}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / out).removesuffix("/out") in done.stderr


@pytest.mark.parametrize("name", ["evaluation.json", "traces/lift_tray/000", "results.json"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, name):
    write = Path.write_text

    def full(path, text, **options):
        if name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=name):
        run(policy="random", tasks=("0",), trials=1, workers=0, out=str(tmp_path))


def test_results_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds another result"):
        evaluate.prepare(Settings(policy="expert", out=str(tmp_path)))


@pytest.mark.parametrize("heavy, bundle, expected", [
    (True, True, 6), (False, True, 16), (False, False, 3)])
def test_environments_that_take_much_memory_are_two_a_worker(heavy, bundle, expected):
    suite, protocol = (types.SimpleNamespace(**values) for values in (
        {"heavy": heavy}, {"tasks": ("a",), "trials": 100}))
    manifest = types.SimpleNamespace(batch_size=16) if bundle else None
    found = evaluate.Evaluation(Settings(workers=3), suite, protocol, None, None, manifest, None)
    assert found.num_envs == expected


def test_tasks_keep_the_order_of_the_suite():
    assert evaluate.choose_tasks(["c", "0"], ("a", "b", "c")) == ("a", "c")
    assert evaluate.choose_tasks([], ("a", "b", "c")) == ("a", "b", "c")


def test_compare(tmp_path):
    """A second evaluation is paired with the first; in the report and in a line at the end."""
    shared = ["--tasks=0", "--trials=2", "--videos=0"]
    done = command("--policy=random", *shared, f"--out={tmp_path / 'random'}")
    assert done.returncode == 0, done.stderr
    done = command("--policy=expert", *shared, f"--out={tmp_path / 'expert'}",
                   f"--compare={tmp_path / 'random' / 'results.json'}")
    assert done.returncode == 0, done.stderr
    assert "+100.0 points over 2 paired trials: 2 succeed only here" in done.stdout
    assert "Comparison by task" in (tmp_path / "expert" / "report.html").read_text()


def test_compare_refuses_other_protocols_before_it_runs(tmp_path):
    run(policy="random", tasks=("0",), trials=1, videos=0, out=str(tmp_path / "a"))
    with pytest.raises(UserError, match="protocols differ in 'trials': 2 here, 1 there"):
        evaluate.prepare(Settings(policy="random", tasks=("0",), trials=2, dry_run=True,
                                  compare=str(tmp_path / "a")))
