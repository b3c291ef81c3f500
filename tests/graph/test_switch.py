# SPDX-License-Identifier: Apache-2.0
"""A switch is set at once, for a block, or for the calls of a function, and for one thread only."""

from __future__ import annotations

import threading

import pytest

from batiste.graph.config import config
from batiste.graph.switch import Switch


class loud(Switch, flag="flax_profile"):
    """Whether to be loud."""


@pytest.fixture(autouse=True)
def quiet_again():
    with loud(False):
        yield


def test_a_call_sets_it_from_here_on():
    loud(True)
    assert loud.current_value() is True


def test_a_block_ends_with_the_value_before_it():
    with loud(True):
        assert loud.current_value() is True
        loud(3)
        assert loud.current_value() == 3
    assert loud.current_value() is False


def test_an_exception_ends_a_block_too():
    with pytest.raises(KeyError), loud(True):
        raise KeyError
    assert loud.current_value() is False


def test_a_switch_that_was_set_can_still_end_as_a_block():
    setting = loud(True)
    with setting:
        pass
    assert loud.current_value() is False


def test_a_decorated_function_runs_under_the_value_and_only_it():
    @loud(True)
    def f(x, *, y):
        return loud.current_value(), x, y

    assert loud.current_value() is False
    assert f(1, y=2) == (True, 1, 2)
    assert f.__name__ == "f"
    assert loud.current_value() is False


def test_another_thread_starts_from_the_flag():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(loud.current_value()))
    thread.start()
    thread.join()
    assert seen == [config.flax_profile]


def test_the_flag_counts_where_nothing_was_set():
    class fresh(Switch, flag="flax_profile"):
        """Another one on the same flag."""

    with config.temp_flip_flag("profile", not config.flax_profile):
        assert fresh.current_value() is config.flax_profile
