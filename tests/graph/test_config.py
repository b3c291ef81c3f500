# SPDX-License-Identifier: Apache-2.0
"""Flags: declaring, reading, updating, overriding for a while, and presetting from the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from batiste.graph import config as flags
from batiste.graph.config import Config, FlagHolder, bool_flag, config, int_flag, static_bool_env, static_int_env


@pytest.fixture
def scratch():
    """Names of flags that a test declares and that are forgotten after it."""
    before = dict(config._values)
    yield
    for name in config._values.keys() - before:
        delattr(Config, name)
    config._values = before


def test_update_takes_a_name_or_a_holder_and_the_holder_reads_it(scratch):
    config.update("flax_profile", False)
    assert config.flax_profile is False
    assert flags.flax_profile.value is False
    config.update(flags.flax_profile, True)
    assert config.flax_profile is True
    assert flags.flax_profile.value is True


def test_an_unknown_flag_is_a_lookup_error_that_lists_the_known_ones():
    with pytest.raises(LookupError, match=r"Unrecognized config option: nope.*flax_profile"):
        config.update("nope", 1)
    with pytest.raises(AttributeError, match="nope"):
        _ = config.nope  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="nope"), config.temp_flip_flag("nope", True):
        pass


def test_a_flag_is_not_set_by_assignment():
    with pytest.raises(AttributeError, match=r"config\.update\('flax_profile', False\)"):
        config.flax_profile = False
    assert config.flax_profile is True


@pytest.mark.parametrize("name", ["profile", "flax_profile"])
def test_temp_flip_flag_restores_the_value_also_after_an_exception(name):
    before = config.flax_profile
    seen = []

    def body():
        with config.temp_flip_flag(name, not before):
            seen.append(config.flax_profile)
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert seen == [not before]
    assert config.flax_profile is before


def test_a_holder_has_no_truth_value():
    with pytest.raises(TypeError, match=r"flax_profile.*\.value"):
        bool(flags.flax_profile)


def test_a_flag_is_declared_once_in_lower_case(scratch):
    holder = bool_flag("FLAX_Scratch", default=True, help="for this test")
    assert holder.name == "flax_scratch"
    assert holder.value is True
    assert "for this test" in (holder.__doc__ or "")
    with pytest.raises(RuntimeError, match="flax_scratch already defined"):
        bool_flag("flax_scratch", default=False, help="again")
    assert int_flag("flax_scratch_count", default=None, help="none").value is None


def test_the_environment_presets_a_flag(scratch, monkeypatch):
    monkeypatch.setenv("FLAX_SCRATCH", "off")
    monkeypatch.setenv("FLAX_SCRATCH_COUNT", "42")
    assert bool_flag("flax_scratch", default=True, help="").value is False
    assert int_flag("flax_scratch_count", default=1, help="").value == 42


@pytest.mark.parametrize(
    ("word", "value"), [("TruE", True), ("on", True), ("Y", True), ("1", True), ("no", False), ("F", False)]
)
def test_boolean_words(monkeypatch, word, value):
    monkeypatch.setenv("SCRATCH", word)
    assert static_bool_env("SCRATCH", not value) is value


def test_other_words_are_refused(monkeypatch):
    monkeypatch.setenv("SCRATCH", "maybe")
    with pytest.raises(ValueError, match="invalid truth value 'maybe' for environment 'SCRATCH'"):
        static_bool_env("SCRATCH", True)
    with pytest.raises(ValueError, match="invalid integer value 'maybe' for environment 'SCRATCH'"):
        static_int_env("SCRATCH", 1)
    monkeypatch.delenv("SCRATCH")
    assert static_bool_env("SCRATCH", True) is True
    assert static_int_env("SCRATCH", None) is None


def test_flags_of_a_fresh_process_come_from_its_environment():
    code = "from batiste.graph.config import config as c; print(c.nnx_graph_mode, c.check_plans, c.flax_max_repr_depth)"
    env = dict(os.environ, NNX_GRAPH_MODE="0", BATISTE_CHECK_PLANS="1", FLAX_MAX_REPR_DEPTH="3")
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True", "3"]


def test_every_flag_has_a_holder_and_an_annotation():
    holders = {holder.name for holder in vars(flags).values() if isinstance(holder, FlagHolder)}
    assert holders == set(config._values) == set(Config.__annotations__)


def test_the_repr_lists_every_flag():
    assert repr(config).startswith("Config(\n  flax_filter_frames=True, \n")
    assert "check_plans=" in repr(config)
    assert repr(Config()) == "Config(\n)"
