# SPDX-License-Identifier: Apache-2.0
"""Files: those of the operating system, or, in the mode TF, all that TensorFlow's gfile reaches (gs://, s3://)."""

from __future__ import annotations

import enum
import glob as globbing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batiste.errors import AlreadyExistsError
from batiste.graph.optional import need

NotFoundError = FileNotFoundError


class BackendMode(enum.Enum):
    """Who reads and writes: Python, or TensorFlow, which must then be installed."""

    DEFAULT = 0
    TF = 1


io_mode = BackendMode.DEFAULT
gfile: Any = None  # TensorFlow's module of that name, once it was used


def set_mode(override: BackendMode) -> None:
    """Chooses who reads and writes."""
    global io_mode
    io_mode = override


@contextmanager
def override_mode(override: BackendMode) -> Iterator[None]:
    """Chooses who reads and writes inside a `with`."""
    before = io_mode
    set_mode(override)
    try:
        yield
    finally:
        set_mode(before)


def _tf() -> Any:
    """TensorFlow's gfile in the mode TF, else None.

    Raises:
        ImportError: TensorFlow is not installed.
    """
    global gfile
    if io_mode is not BackendMode.TF:
        return None
    if gfile is None:
        gfile = need("tensorflow", extra="tensorflow").io.gfile
    return gfile


def GFile(name: Any, mode: str) -> Any:
    """An open file."""
    tf = _tf()
    return tf.GFile(name, mode) if tf else open(name, mode)


def listdir(path: Any) -> list[str]:
    """The names in a directory."""
    tf = _tf()
    return tf.listdir(path) if tf else os.listdir(path)


def isdir(path: Any) -> bool:
    """Whether there is such a directory."""
    tf = _tf()
    return tf.isdir(path) if tf else os.path.isdir(path)


def exists(path: Any) -> bool:
    """Whether there is such a file or directory."""
    tf = _tf()
    return tf.exists(path) if tf else os.path.exists(path)


def getsize(path: Any) -> int:
    """The size of a file in bytes."""
    tf = _tf()
    return tf.stat(path).length if tf else os.path.getsize(path)


def glob(pattern: Any) -> list[str]:
    """The paths that match a pattern with `*` and `?`."""
    tf = _tf()
    return tf.glob(pattern) if tf else globbing.glob(pattern)


def makedirs(path: Any) -> None:
    """Makes a directory and those above it, as far as they are not there."""
    tf = _tf()
    return tf.makedirs(path) if tf else os.makedirs(path, exist_ok=True)


def copy(src: Any, dst: Any, overwrite: bool = False) -> None:
    """Copies a file.

    Raises:
        AlreadyExistsError: there is a `dst`, and `overwrite` is false.
    """
    tf = _tf()
    if tf:
        return tf.copy(src, dst, overwrite=overwrite)
    _check_free(dst, overwrite)
    shutil.copy(src, dst)


def rename(src: Any, dst: Any, overwrite: bool = False) -> None:
    """Gives a file or directory another path; a `dst` that is there is replaced at once, never half.

    Raises:
        AlreadyExistsError: there is a `dst`, and `overwrite` is false.
    """
    tf = _tf()
    if tf:
        return tf.rename(src, dst, overwrite=overwrite)
    _check_free(dst, overwrite)
    os.replace(src, dst)


def _check_free(path: Any, overwrite: bool) -> None:
    if os.path.exists(path) and not overwrite:
        raise AlreadyExistsError(str(path))


def remove(path: Any) -> None:
    """Deletes a file."""
    tf = _tf()
    return tf.remove(path) if tf else os.remove(path)


def rmtree(path: Any) -> None:
    """Deletes a directory with all that is in it."""
    tf = _tf()
    return tf.rmtree(path) if tf else shutil.rmtree(path)
