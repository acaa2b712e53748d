"""The rival's library: what is not it is refused in one line; what is gets its arguments."""

import ctypes.util
from pathlib import Path

import pytest

from benchmarks import w2a8


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(w2a8.LibraryError, match=r"^w2a8: .*none\.so: .*; possible: the libbitnet"):
        w2a8.load(tmp_path / "none.so")


def test_refuses_a_library_without_the_function(monkeypatch):
    """The process itself, as ctypes gives it for no name."""
    library = ctypes.CDLL(None)
    monkeypatch.setattr(w2a8.ctypes, "CDLL", lambda name: library)
    with pytest.raises(w2a8.LibraryError, match="undefined symbol: bitlinear_int8xint2"):
        w2a8.load(Path("libc.so"))
