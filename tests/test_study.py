"""Studies: what is run, and not run again, and what follows from the results."""

import json
import pathlib
import subprocess
import sys

import pytest

from jaxvp import study
from jaxvp.errors import UserError
from jaxvp.study import Claim, Row, Run, Study

ROOT = pathlib.Path(__file__).parent.parent
TWO = Study(
    question="Does B help?", data={"data/made": ("tabletop", "--episodes=2")},
    rows={"a": Row("A", (Run("a.py", {"steps": 3}),)),
          "b": Row("A, then B", (Run("a.py"), Run("b.py:x", {"stage": "joint"})))},
    claims=[Claim("B helps.", "b", "a", "toys"), Claim("B helps t1.", "b", "a", "toys", ("t1",)),
            Claim("A helps.", "a", "b", "toys"), Claim("A helps elsewhere.", "a", "b", "others")],
    suites={"toys": 10, "others": 10}, seeds=2)


def results(rate, tasks=("t0", "t1")):
    """Of ten trials a task, `rate` times ten succeed, the first ones."""
    episodes = [{"task": task, "trial": trial, "success": trial < 10 * rate}
                for task in tasks for trial in range(10)]
    return {"success_rate": rate, "episodes": episodes, "protocol": {"suite": "toys"},
            "bundle": {"git_revision": "abc"},
            "tasks": [{"name": task, "successes": round(10 * rate), "trials": 10}
                      for task in tasks]}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The commands of a study, which do as if; B's success rate is 0.9, that of A 0.4."""
    monkeypatch.chdir(tmp_path)
    made = []

    def call(*words):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        made.append((words[0].removeprefix("jaxvp."), flags))
        if words[0] == "data_builders.build":
            target, text = pathlib.Path(flags["out"], "1.0.0", "dataset_info.json"), ""
        elif words[0] == "jaxvp.main":
            target = pathlib.Path(flags["workdir"], "metrics.jsonl")
            text = "".join(json.dumps({"time": time}) + "\n" for time in (5.0, 7.0))
        elif words[0] == "jaxvp.export":
            target, text = pathlib.Path(flags["out"], "policy.json"), ""
        else:
            target = pathlib.Path(flags["out"], "results.json")
            text = json.dumps(results(0.9 if "/b/" in flags["out"] else 0.4))
        target.parent.mkdir(parents=True)
        target.write_text(text)

    monkeypatch.setattr(study, "_call", call)
    return made


def test_every_step_is_done_once(calls, tmp_path):
    study.run(TWO, tmp_path / "out", ["a"], [0])
    assert [name for name, _ in calls] == [
        "data_builders.build", "main", "export", "evaluate", "evaluate"]
    assert calls[1][1] == {"config": "a.py", "config.seed": "0", "config.steps": "3",
                           "workdir": str(tmp_path / "out/a/0/run0")}
    calls.clear()
    (tmp_path / "out/a/0/toys/results.json").unlink()
    (tmp_path / "out/a/0/toys").rmdir()
    study.run(TWO, tmp_path / "out", ["a", "b"], [0, 1])
    assert [name for name, _ in calls] == [
        "evaluate", "main", "main", "export", "evaluate", "evaluate",
        "main", "export", "evaluate", "evaluate", "main", "main", "export", "evaluate", "evaluate"]
    second = calls[2][1]
    assert second["config"] == "b.py:x" and second["config.stage"] == "joint"
    assert second["config.init_from.video"] == second["config.init_from.text"] == str(
        tmp_path / "out/b/0/run0")
    assert calls[3][1]["workdir"] == second["workdir"] and calls[10][1]["config.seed"] == "1"
    calls.clear()
    study.run(TWO, tmp_path / "out", ["a", "b"], [0, 1])
    assert not calls


def test_the_table_and_the_claims(calls, tmp_path, capsys):
    study.run(TWO, tmp_path / "out", ["a", "b"], [0, 1])
    others = [tmp_path / f"out/a/{seed}/others/results.json" for seed in (0, 1)]
    others[0].write_text(json.dumps(results(1.0)))
    others[1].write_text(json.dumps(results(0.6)))
    found = json.loads(json.dumps(study.table(TWO, tmp_path / "out")))
    rates = found["rows"]["b"]["suites"]["toys"]
    assert rates["rate"] == pytest.approx(0.9) and rates["trials"] == 40
    assert rates["interval"][0] < 0.9 < rates["interval"][1]
    assert rates["tasks"] == {"t0": 18, "t1": 18} and rates["seeds"] == {"0": 0.9, "1": 0.9}
    assert found["rows"]["b"]["training_seconds"] == {"0": 4, "1": 4}
    assert [claim["verdict"] for claim in found["claims"]] == [
        "holds", "holds", "is reversed", "open"]
    assert found["claims"][0]["difference"] == pytest.approx(0.5)
    assert [claim["trials"] for claim in found["claims"]] == [40, 20, 40, 40]
    assert found["claims"][3]["seeds"] == pytest.approx({"0": 0.1, "1": -0.3})
    study.show(found)
    shown = capsys.readouterr().out
    assert "B helps. HOLDS: +50.0% (+34.5% to +65.5%)" in shown and "A, then B" in shown


def test_a_part_of_the_results_makes_a_part_of_the_table(calls, tmp_path, capsys):
    study.run(TWO, tmp_path / "out", ["a"], [0])
    found = study.table(TWO, tmp_path / "out")
    assert {claim["verdict"] for claim in found["claims"]} == {"not measured"}
    assert found["rows"]["b"] == {"about": "A, then B", "suites": {}, "training_seconds": {}}
    study.show(found)
    assert "40%" in capsys.readouterr().out


def test_a_command_that_fails_ends_the_study():
    with pytest.raises(UserError, match="ended with status 1"):
        study._call("jaxvp.main", "--config=absent.py")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["video_helps", "tabletop_recipe"])
def test_the_studies_are_in_order(name, quick, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = study.load(name, quick)
    for claim in found.claims:
        assert {claim.better, claim.worse} <= found.rows.keys() and claim.suite in found.suites
    for row in found.rows.values():
        for training in row.runs:
            sources = {source["path"] for source in training.changes["data.sources"]}
            assert sources <= found.data.keys()


def test_what_is_refused():
    def said(*words):
        return subprocess.run([sys.executable, "-m", "jaxvp.study", *words], cwd=ROOT, text=True,
                              capture_output=True).stderr

    assert "NAME is missing" in said()
    assert "no study 'video_help'. Did you mean 'video_helps'?" in said("video_help")
    assert "'more' is not a flag" in said("video_helps", "more")
    assert "--rows: there is no 'all_join'" in said("video_helps", "--rows=all_join", "--table")
