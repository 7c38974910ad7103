"""A build on Apache Beam: the same files as from processes, continued in the same way."""

import pytest
from toy import Toy

from data_builders import build, writer
from jaxvp.errors import UserError

pytest.importorskip("apache_beam", reason="needs the extra `beam`")

# Flags of the runner that DirectRunner takes when it finds no other; in this process.
FLAGS = ["--runner=FnApiRunner"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("toy-*")}


def test_beam_writes_what_processes_write(tmp_path):
    builder = Toy()
    one, expected = build.build(builder, builder.items(), tmp_path / "one", num_workers=1)
    two, report = build.build(builder, builder.items(), tmp_path / "two", beam_flags=FLAGS)
    assert contents(one) == contents(two) and len(contents(two)) == 4
    assert report == expected and report.skipped == {"not successful": 1}


def test_finished_shards_are_not_built_again(tmp_path):
    class Late(Toy):
        def build(self, item):
            assert item >= 6, "the first shards are there"
            return super().build(item)

    builder = Toy()
    folder = writer.open_folder(builder, builder.items(), tmp_path)
    for shard in writer.make_shards(builder, builder.items()):
        if shard.items[0] < 6:
            writer.write_shard(builder, shard, folder)
    _, report = build.build(Late(), builder.items(), tmp_path, beam_flags=FLAGS)
    assert report.kept == 10


def test_an_error_of_a_worker_stops_the_build(tmp_path, monkeypatch):
    def full(*_):
        raise writer.WriteError("No space left on device")

    builder = Toy()
    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(UserError, match="No space left on device"):
        build.build(builder, builder.items(), tmp_path, beam_flags=FLAGS)
    assert not (tmp_path / "1.0.0").exists()


def test_workers_that_do_not_share_the_folder_are_noticed(tmp_path, monkeypatch):
    builder = Toy()
    monkeypatch.setattr(writer, "write_shard", lambda *_: None)
    with pytest.raises(UserError, match="4 of 4 shards are not in .*: do the workers share it?"):
        build.build(builder, builder.items(), tmp_path, beam_flags=FLAGS)
