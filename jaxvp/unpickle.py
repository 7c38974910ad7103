"""Pickles of NumPy arrays and plain Python values, without the code that a pickle could run.

NumPy's own code for pickles is run on checked values only: it believes in dtypes whose fields are
outside the item, in flags, and in lists that are too short, and then reads any memory.
"""

import codecs
import math
import pickle
from typing import BinaryIO

import numpy as np

from jaxvp.errors import UserError


class _DType:
    """Stands for a dtype until its byte order is known."""

    def __init__(self, name: str):
        self.value = np.dtype(name if isinstance(name, str) else "V")
        if self.value.kind not in "biufcSUO":
            raise pickle.UnpicklingError(f"it asks for the dtype {name!r}, which is not allowed")

    def __setstate__(self, state: tuple):
        """`state`: version, byte order, subarray, names, fields, size, alignment and flags."""
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("it asks for a dtype with fields, which is not allowed")
        self.value = self.value.newbyteorder(order) if order in ("<", ">") else self.value


class _Array(np.ndarray):
    def __setstate__(self, state: tuple):
        """`state`: version, shape, dtype, whether it is in Fortran's order, and the values."""
        version, shape, dtype, fortran, values = state
        if dtype.value.hasobject and len(values) != math.prod(shape):
            raise pickle.UnpicklingError(f"an array {shape} has {len(values)} values")
        super().__setstate__((version, shape, dtype.value, fortran, values))


def _dtype(name, *_) -> _DType:
    return _DType(name)


def _array(*_) -> _Array:
    return np.empty(0).view(_Array)


def _scalar(dtype: _DType, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.value, 1)[0]


# What pickles of arrays ask for; before NumPy 2 numpy._core was numpy.core. Functions only: of a
# class the pickle could change the attributes.
_ALLOWED = {
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): None,  # Given to `_reconstruct`.
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        place = module.replace("numpy.core.", "numpy._core."), name
        if place not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {'.'.join(place)}, which is not allowed")
        return _ALLOWED[place]


def load(file: BinaryIO):
    """Reads one pickle of arrays, lists, tuples, dicts, texts and numbers. Arrays and scalars have
    numbers, truth values, texts or Python objects, and no fields.

    Raises:
      UserError: it asks for anything else, or is damaged.
    """
    try:
        return _Unpickler(file).load()
    except Exception as error:  # A damaged pickle may raise anything.
        raise UserError(f"a pickle cannot be read: {error}") from error
