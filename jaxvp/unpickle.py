"""Pickles of NumPy arrays and plain Python values, without the code that a pickle could run."""

import pickle
from typing import BinaryIO

from jaxvp.errors import UserError

# What pickles of arrays ask for; before NumPy 2 numpy._core was numpy.core.
_ALLOWED = (
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def load(file: BinaryIO):
    """Reads one pickle of arrays, lists, tuples, dicts, texts and numbers.

    Raises:
      UserError: it asks for anything else, or is damaged.
    """
    try:
        return _Unpickler(file).load()
    except Exception as error:  # A damaged pickle may raise anything.
        raise UserError(f"a pickle cannot be read: {error}") from error
