"""How a command ends: in one line that names the file, or with the traceback of a bug."""

import errno
import socket

import numpy as np
import orbax.checkpoint as ocp
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxvp.errors import UserError, did_you_mean, naming, one_line_errors, os_error


def ends(action) -> str:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        action()
    return caught.value.code


def test_refusals_of_the_operating_system(tmp_path):
    (tmp_path / "file").write_text("")
    found = ends(lambda: (tmp_path / "file" / "x").write_text(""))
    assert found == f"error: {tmp_path}/file/x: Not a directory"
    found = ends(lambda: (tmp_path / "file").mkdir())
    assert found == f"error: {tmp_path}/file: File exists"


def test_a_port_in_use():
    with socket.create_server(("localhost", 0)) as server:
        found = ends(lambda: socket.create_server(server.getsockname()))
        port = server.getsockname()[1]
    assert found.startswith("error: Address already in use") and str(port) in found


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file():
    def write():
        with naming("runs/a[/b]"):
            full_disk()
    assert ends(write) == "error: runs/a[/b]: No space left on device"


def test_what_was_raised_from_it_counts():
    def wrap():
        try:
            full_disk()
        except OSError as error:
            raise RuntimeError("The worker failed.") from error
    assert ends(wrap) == "error: No space left on device"


def test_a_bug_keeps_its_traceback():
    def bug():
        try:
            full_disk()
        except OSError:
            return {}["a bug while it is handled"]
    for action, kind in ((bug, KeyError), (lambda: int("x"), ValueError), (lambda: 1 / 0,
                                                                          ZeroDivisionError)):
        with pytest.raises(kind), one_line_errors():
            action()
    assert os_error(OSError("no number")) is None
    assert ends(lambda: (_ for _ in ()).throw(UserError("a: wrong"))) == "error: a: wrong"


def test_what_array_record_says(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.array_record"
    found = ends(lambda: ArrayRecordWriter(str(path), "").close())
    assert found == f"error: {path}: Not a directory"


def test_what_orbax_says_of_a_file_in_place_of_a_folder(tmp_path):
    """TensorStore has no exceptions of its own: what the system said is in the text."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "params", {"w": np.ones(100_000)})
    data = max((tmp_path / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    data.unlink()
    data.mkdir()

    def read():
        with ocp.StandardCheckpointer() as reader:
            reader.restore(tmp_path / "params")
    assert ends(read) == f"error: {data}: Is a directory"


def test_the_nearest_name_is_suggested():
    known = ("lift_tray", "red_on_plate")
    assert did_you_mean("lift_trai", known) == " Did you mean 'lift_tray'?"
    assert did_you_mean("lift_trai", known, str) == " Did you mean lift_tray?"
    assert did_you_mean("x", known) == ""
