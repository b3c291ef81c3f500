# SPDX-License-Identifier: Apache-2.0
"""The library's frames are left out of errors, or shown."""

from __future__ import annotations

import traceback
from pathlib import Path

import jax
import pytest

from batiste import traceback_util, traverse_util

OURS = str(Path(traverse_util.__file__).parent)


@pytest.fixture(autouse=True)
def as_before():
    mode = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "remove_frames")
    yield
    jax.config.update("jax_traceback_filtering", mode)
    traceback_util.hide_flax_in_tracebacks()


@traceback_util.api_boundary
def called(f):
    return traverse_util.path_aware_map(lambda path, x: f(x), {"a": {"b": 1}})


def failing(x):
    raise ValueError(x)


def files() -> list[str]:
    with pytest.raises(ValueError, match="1") as error:
        called(failing)
    return [frame.filename for frame in traceback.extract_tb(error.tb)]


def test_frames_are_hidden_and_shown() -> None:
    traceback_util.show_flax_in_tracebacks()
    assert any(file.startswith(OURS) for file in files())
    for _ in range(2):
        traceback_util.hide_flax_in_tracebacks()
    assert not any(file.startswith(OURS) for file in files()) and __file__ in files()
    traceback_util.show_flax_in_tracebacks()
    assert any(file.startswith(OURS) for file in files())


def test_other_files_can_be_counted_in() -> None:
    traceback_util.hide_flax_in_tracebacks()
    traceback_util.register_exclusion("/somewhere/else.py")
    hidden = traceback_util.hidden_paths
    assert hidden.count("/somewhere/else.py") == 1
    traceback_util.show_flax_in_tracebacks()
    assert "/somewhere/else.py" not in hidden and OURS not in hidden
    traceback_util.hide_flax_in_tracebacks()
    assert hidden.count("/somewhere/else.py") == hidden.count(OURS) == 1
    traceback_util._flax_exclusions.remove("/somewhere/else.py")
    hidden.remove("/somewhere/else.py")
