"""The shared conversion code: command line, shards, reports, interrupted builds, bad episodes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import pytest
from toy import Toy

from data_builders import build, writer
from jaxvp.data import rlds
from jaxvp.errors import UserError


@pytest.fixture
def toy(monkeypatch):
    """`toy` as a builder name on the command line."""
    known = {"toy": Toy}
    monkeypatch.setattr(build, "builder_names", lambda: ["toy"])
    monkeypatch.setattr(build, "builder_class", lambda name: known[name])


def written(folder):
    """Contents of the data files."""
    return {path.name: path.read_bytes() for path in folder.glob("toy-*")}


def test_two_workers_write_what_one_writes(tmp_path):
    builder = Toy()
    one, report = build.build(builder, builder.items(), tmp_path / "one", num_workers=1)
    two, _ = build.build(builder, builder.items(), tmp_path / "two", num_workers=2)
    assert written(one) == written(two) and len(written(one)) == 4
    assert rlds.splits(one) == ("train", "val")
    assert len(rlds.Episodes(one, "val")) == 2 and len(rlds.Episodes(one, "train")) == 8
    assert (report.items, report.kept, report.records, report.steps) == (12, 10, 10, 30)
    saved = json.loads((one / "build_report.json").read_text())
    assert saved["skipped"] == {"not successful": 1}
    assert saved["unreadable"] == [{"item": "5", "error": "OSError: file ends early"}]
    assert saved["options"]["size"] == 8 and sorted(p.name for p in one.parent.iterdir()) == [
        "1.0.0"
    ]
    assert not (one / "shards").exists()


@pytest.mark.parametrize("name", build.builder_names())
def test_the_options_of_every_builder_are_shown(name, capsys):
    with pytest.raises(SystemExit) as end:
        build.parse([name, "--help"])
    assert not end.value.code and "--num_workers" in capsys.readouterr().out


def test_a_build_killed_before_its_last_step_is_finished_by_the_next(tmp_path, monkeypatch):
    builder, out = Toy(), tmp_path / "out"
    replace = writer.os.replace

    def killed(source, target):
        if Path(target).name == "1.0.0":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(writer.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build.build(builder, builder.items(), out, num_workers=1)
    monkeypatch.undo()
    unfinished = out / "1.0.0.incomplete"
    assert (unfinished / "dataset_info.json").exists()
    for path in out, unfinished:
        with pytest.raises(UserError, match="an unfinished build"):
            rlds.version_folder(path)
    folder, _ = build.build(builder, builder.items(), out, num_workers=1)
    assert rlds.version_folder(out) == folder and not unfinished.exists()


def test_shards_of_an_unknown_build_are_refused(tmp_path):
    builder, out = Toy(), tmp_path / "out"
    folder = writer.open_folder(builder, builder.items(), out)
    (shard, *_) = writer.make_shards(builder, builder.items())
    (folder / "shards" / "recipe.json").unlink()
    assert writer.open_folder(builder, builder.items(), out) == folder  # There was nothing.
    writer.write_shard(builder, shard, folder)
    (folder / "shards" / "recipe.json").unlink()
    with pytest.raises(UserError, match="holds shards, but no recipe.json that says of which"):
        writer.open_folder(builder, builder.items(), out)


def test_a_killed_build_continues_with_the_missing_shards(tmp_path):
    kill = tmp_path / "kill"
    kill.touch()
    builder, out = Toy(kill=str(kill)), tmp_path / "out"
    with pytest.raises(UserError, match="worker process died.*keeps the finished shards"):
        build.build(builder, builder.items(), out, num_workers=1)
    with pytest.raises(UserError, match="an unfinished build"):
        rlds.version_folder(out)
    finished = sorted((out / "1.0.0.incomplete" / "shards").glob("*.json"))
    names = [path.stem for path in finished if path.stem != "recipe"]
    assert names == ["train-00000"]
    with pytest.raises(UserError, match="other options or items"):
        writer.open_folder(dataclasses.replace(builder, size=9), builder.items(), out)
    first = out / "1.0.0.incomplete" / "shards" / "train-00000"
    os.utime(first, (1, 1))
    kill.unlink()
    folder, report = build.build(builder, builder.items(), out, num_workers=1)
    assert (folder / "toy-train.array_record-00000-of-00003").stat().st_mtime == 1
    assert report.kept == 10 and len(rlds.Episodes(folder, "train")) == 8


def test_nothing_kept_is_an_error_and_no_dataset(tmp_path):
    builder = Toy()
    with pytest.raises(ValueError, match="(?s)No episode of 2.*not successful.*file ends early"):
        build.build(builder, [3, 5], tmp_path, num_workers=1)
    assert not (tmp_path / "1.0.0").exists()


def test_existing_dataset_is_not_touched(tmp_path):
    (tmp_path / "1.0.0").mkdir()
    with pytest.raises(UserError, match="choose another --out"):
        writer.open_folder(Toy(), [], tmp_path)


@pytest.mark.parametrize("kind", [NameError, MemoryError])
def test_what_is_wrong_with_the_code_or_the_machine_stops_the_build(tmp_path, kind):
    class Broken(Toy):
        def build(self, item):
            raise kind("not the item")

    builder = Broken()
    folder = writer.open_folder(builder, [0], tmp_path)
    (shard,) = writer.make_shards(builder, [0])
    with pytest.raises(kind, match="not the item") as stop:
        writer.write_shard(builder, shard, folder)
    assert stop.value.__notes__ == ["The item was 0."]
    assert [path.name for path in (folder / "shards").iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("kind", [TypeError, IndexError, AttributeError, ZeroDivisionError,
                                  cv2.error, zipfile.BadZipFile])
def test_whatever_is_wrong_with_an_item_is_counted(tmp_path, kind):
    """Such as null where the layout has a list."""
    class Odd(Toy):
        def build(self, item):
            if item == 1:
                raise kind("odd")
            return super().build(item)

    builder = Odd()
    folder = writer.open_folder(builder, [0, 1], tmp_path)
    (shard,) = writer.make_shards(builder, [0, 1])
    report = writer.write_shard(builder, shard, folder)
    assert report.kept == 1
    assert report.unreadable == [{"item": "1", "error": f"{kind.__name__}: odd"}]


def test_options_come_from_the_command_line(toy):
    argv = ["toy", "--out=x", "--size=16", "--flips=a,b", "--grey", "--max_episodes=3"]
    settings, builder = build.parse(argv)
    assert builder == Toy(size=16, flips=("a", "b"), grey=True) and settings.max_episodes == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["toy", "--out=x", "--sise=3"], "unknown --sise=3. Did you mean --size?"),
        (["toy"], "--out is missing"),
        (["toy", "--out=x", "--num_workers=0"], "--num_workers must be at least 1, found 0"),
        (["toy", "--out=x", "--size=big"], "argument --size: invalid int value: 'big'"),
    ],
)
def test_bad_command_lines(toy, argv, message, capsys):
    with pytest.raises(SystemExit):
        build.parse(argv)
    assert message in capsys.readouterr().err


def test_unknown_builder_is_suggested():
    assert "tabletop" in build.builder_names()
    with pytest.raises(ValueError, match="No builder 'tabeltop'. Did you mean 'tabletop'?"):
        build.parse(["tabeltop", "--out=x"])


def test_raw_folder_is_asked_for_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        build.parse(["libero", "--out=x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --raw is missing: folder of ")


def test_dry_run_says_what_is_there_and_writes_nothing(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build.main(["toy", "--dry_run", f"--out={tmp_path / 'data'}"])
    out = capsys.readouterr().out
    for line in (
        "toy 1.0.0: 12 items in 4 shards\n",
        "  head: camera [8, 8, 3]\n", "  state: x [m]\n", "  action: x [m]\n",
        "10 of 12 episodes kept, 10 records, 30 steps", "  skipped 1: not successful\n",
        "  unreadable 5: OSError: file ends early\n",
        "item 2: records of [3] steps, instruction 'play'\n", "  fps: 10.0\n", "  robot: toy\n",
        "all 12 items: about 0.000 GB, 0:00:00",
    ):
        assert line in out, line
    assert not list(tmp_path.iterdir())


def test_dry_run_takes_a_sample_and_scales_it(toy, capsys, monkeypatch):
    monkeypatch.setattr(build, "SAMPLE_ITEMS", 3)
    build.dry_run(Toy(size=256), list(range(12)), 2)
    out = capsys.readouterr().out
    megabytes = re.search("3 of 3 episodes kept, .* ([0-9.]+) MB, of 3 items", out)[1]
    gigabytes = re.search("all 12 items: about ([0-9.]+) GB", out)[1]
    assert float(megabytes) > 0.2 and abs(float(gigabytes) - 4e-3 * float(megabytes)) <= 1e-3
    monkeypatch.setattr(build, "SAMPLE_SECONDS", -1)
    build.dry_run(Toy(), list(range(12)), 2)
    assert "of 1 items" in capsys.readouterr().out
    build.dry_run(Toy(), [3], 2)
    out = capsys.readouterr().out
    assert "0 of 1 episodes kept" in out and "records of" not in out


def test_list_names_all_builders(capsys, monkeypatch):
    """Also those whose packages are not installed."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "data_builders.libero.libero", raising=False)
    monkeypatch.delitem(sys.modules, "jaxvp.envs.libero", raising=False)
    build.main(["--list"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == build.builder_names()
    assert lines["libero"] == "(libero needs `pip install h5py`)"
    assert lines["tabletop"].startswith("Tabletop demonstrations: two arms")
    with pytest.raises(UserError, match="libero needs `pip install h5py`"):
        build.parse(["libero", "--raw=x", "--out=x"])


def test_every_builder_is_listed_in_one_line():
    for name in build.builder_names():
        cls = build.builder_class(name)
        first = (cls.__doc__ or "").partition("\n")[0]
        assert 20 < len(first) < 100 and first.endswith("."), name


def test_a_module_of_ours_that_is_missing_is_no_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxvp.envs.tabletop", None)
    monkeypatch.delitem(sys.modules, "data_builders.tabletop.tabletop", raising=False)
    monkeypatch.delattr("jaxvp.envs.tabletop", raising=False)
    with pytest.raises(ModuleNotFoundError, match="jaxvp.envs.tabletop"):
        build.builder_class("tabletop")


def test_beam_flags_are_one_flag(toy):
    settings, _ = build.parse(["toy", "--out=x", "--beam=--runner=A --b='c d'"])
    assert settings.beam == ["--runner=A", "--b=c d"]


def test_report_is_printed_in_full_but_for_a_long_list(capsys):
    errors = [{"item": str(k), "error": "OSError: x"} for k in range(25)]
    build.print_report(writer.Report(
        items=30, kept=3, records=4, steps=9, num_bytes=2_500_000, skipped={"short": 2},
        notes={"cut": 1}, unreadable=errors))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 of 30 episodes kept, 4 records, 9 steps, 2.5 MB, of 30 items"
    assert out[1:4] == ["  skipped 2: short", "  repaired 1: cut", "  unreadable 0: OSError: x"]
    assert len(out) == 24 and out[-1] == "  unreadable: 5 more, see build_report.json"


def test_workers_end_with_their_parent(tmp_path):
    """Also when it is killed, and cannot tell them."""
    (tmp_path / "kill").touch()
    script = (
        "from pathlib import Path\nfrom toy import Toy\nfrom data_builders import build\n"
        "if __name__ == '__main__':\n"
        f"    builder = Toy(sleep={str(tmp_path / 'pid')!r})\n"
        f"    build.build(builder, builder.items(), Path({str(tmp_path)!r}), 1)\n"
    )
    (tmp_path / "script.py").write_text(script)
    folders = [Path(__file__).parent, Path(__file__).parents[2]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "pid").exists)
    worker = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not running(worker))


def wait_until(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("10 seconds are over")


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")  # A zombie has nobody here who buries it.
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_left_overs_of_killed_workers_are_removed(tmp_path):
    builder = Toy()
    folder = writer.open_folder(builder, builder.items(), tmp_path)
    (folder / "shards" / "train-00000.abc.partial").write_bytes(b"half")
    writer.open_folder(builder, builder.items(), tmp_path)
    assert [path.name for path in (folder / "shards").iterdir()] == ["recipe.json"]


def test_progress_counts_items_and_episodes(tmp_path):
    builder = Toy()
    folder = writer.open_folder(builder, builder.items(), tmp_path)
    shard = writer.make_shards(builder, builder.items())[1]
    seen = []
    writer.write_shard(builder, shard, folder,
                       lambda report: seen.append((report.items, report.kept)))
    # Items 6 to 9; before the end of an item its episode is counted.
    assert shard.items == (6, 7, 8, 9)
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)]


def test_command_builds_and_reads_back(toy, tmp_path, capsys):
    build.main(["toy", f"--out={tmp_path}", "--max_episodes=4", "--num_workers=1"])
    out = capsys.readouterr().out
    assert "3 of 4 episodes kept" in out and "skipped 1: not successful" in out
    assert "train: 1 records, 3 steps, readable" in out


def test_split_by_hash_is_stable_and_near_its_share():
    builder = dataclasses.replace(Toy(), val_fraction=0.25)
    split = super(Toy, builder).split
    drawn = [split(f"episode {i}") for i in range(2000)]
    assert 400 < drawn.count("val") < 600
    assert drawn[:3] == [split(f"episode {i}") for i in range(3)]
