"""Writes files for the scripts beside it."""

import contextlib
import os
import typing


@contextlib.contextmanager
def whole_file(path) -> typing.Iterator[typing.TextIO]:
    """A text file to be written, which is there under its name when it is whole, or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="\n") as file:
        yield file
    os.replace(f"{path}.tmp", path)
