"""Pickles of arrays are read as NumPy reads them; nothing else is, and no memory outside."""

import io
import os
import pickle

import numpy as np
import pytest

from jaxvp import unpickle
from jaxvp.errors import UserError


class Reduced:
    """Pickled as a call, and the state that is set on what it gives."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def load(value, protocol=4):
    return unpickle.load(io.BytesIO(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("value", [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array(["ab", "c"]), np.array([b"ab"]), np.array([True]), np.array([1, 2], ">i2"),
    np.array({"a": [1, "b"]}, object), np.array([[1, "a"], [None, 2.5]], object), np.array(3j),
    np.float32(3), np.int64(4), np.bool_(True),
], ids=repr)
def test_arrays_and_scalars(value, protocol):
    found = load({"a": [value, (1, "x")]}, protocol)["a"][0]
    expected = pickle.loads(pickle.dumps(value, protocol))
    assert isinstance(found, type(value)) and found.dtype == expected.dtype
    assert found.shape == value.shape and found.tolist() == value.tolist()


def dtype(fields, size=8, name="V8", flags=27):
    """A dtype with fields, wherever they are."""
    names = tuple(fields)
    return Reduced(np.dtype, (name, False, True), (3, "|", None, names, fields, size, 1, flags))


SCALAR = np.float64(0).__reduce__()[0]
ARRAY = np.zeros(1).__reduce__()[0]


def array(dtype, values, shape=(1,)):
    return Reduced(ARRAY, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, values))


@pytest.mark.parametrize("value", [
    dtype({"a": (np.dtype("f8"), 0)}),
    dtype({"a": (np.dtype("O"), 4096)}),
    dtype({"a": (np.dtype("O"), 4096)}, name="f8"),
    Reduced(SCALAR, (dtype({"a": (np.dtype("O"), 4096)}), bytes(8))),
    array(dtype({"a": (np.dtype("O"), 4096)}), [None], ()),
    np.zeros(2, "f4, i4"), np.zeros(2, "V4"), np.dtype(("i4", (2,))),
    np.array(["2020-01-01"], "M8[D]"),
])
def test_dtypes_with_fields_are_refused(value):
    with pytest.raises(UserError, match="cannot be read: it asks for .*dtype.* not allowed"):
        load(value)


@pytest.mark.parametrize(("value", "message"), [
    (array(np.dtype("O"), [], (9,)), r"an array \(9,\) has 0 values"),
    # Objects that are said to be none, so that bytes would be taken for addresses.
    (array(Reduced(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)),
           b"A" * 8), "has 8 values"),
    (array(np.dtype("f8"), bytes(4)), "buffer size"),
    (Reduced(SCALAR, (np.dtype("O"), bytes(8))), "OBJECT array"),
    (Reduced(os.mkdir, ("attacked",)), "mkdir, which is not allowed"),
    (Reduced(np.ndarray, ((9,), "O")), "not callable"),
])
def test_what_reads_memory_or_runs_code_is_refused(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"a pickle cannot be read: .*{message}"):
        load(value)
    assert not list(tmp_path.iterdir())
