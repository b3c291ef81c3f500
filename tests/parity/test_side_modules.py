# SPDX-License-Identifier: Apache-2.0
"""Beside models: the same bytes, dicts, schedules, scales, scans and checkpoints from either library."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import GenericAlias, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

MODULES = (
    "core.frozen_dict traverse_util serialization jax_utils cursor struct typing configurations training.train_state "
    "training.early_stopping training.lr_schedule training.common_utils training.dynamic_scale training.checkpoints"
)


def library(name: str) -> SimpleNamespace:
    modules = {path.rpartition(".")[2]: import_module(f"{name}.{path}") for path in MODULES.split()}
    return SimpleNamespace(**modules)


OURS, THEIRS = library("batiste"), library("flax")


class Pair(NamedTuple):
    x: Any
    y: Any


# ---------------------------------------------------------------- names and signatures


def public(module: Any) -> dict[str, Any]:
    """The functions and classes that a module defines, beside those whose name starts with an underscore."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    }


@pytest.mark.parametrize(
    "path", (MODULES + " io ids traceback_util training.prefetch_iterator training.orbax_utils").split()
)
def test_every_name_with_the_same_parameters(path) -> None:
    ours, theirs = import_module(f"batiste.{path}"), import_module(f"flax.{path}")
    for name, value in public(theirs).items():
        if inspect.isclass(value) and "__init__" not in vars(value):
            assert inspect.isclass(getattr(ours, name)), name
        elif not isinstance(value, TypeVar | GenericAlias):
            parameters = [list(inspect.signature(f).parameters) for f in (getattr(ours, name), value)]
            assert parameters[0] == parameters[1], name


# ---------------------------------------------------------------- bytes

LEAVES = {
    "numbers": {"int": 3, "float": 2.5, "bool": True, "none": None, "complex": 1j, "text": "ä", "bytes": b"\0"},
    "arrays": {"b": np.arange(6, dtype=np.int8).reshape(2, 3).T, "a": jnp.ones((2, 2)), "empty": np.zeros((0, 2))},
    "scalars": {"f": np.float32(1.5), "b": ml_dtypes.bfloat16(2), "d": np.datetime64("2020-01-01")},
    "small dtypes": {name: jnp.ones(3, name) for name in ("bfloat16", "float8_e4m3fn", "int4", "bool")},
    "containers": {"list": [1, (2, Pair(3, {"x": 4}))], "numbered": {1: 2}, "empty": {}},
    "optimizer": optax.adam(0.1).init({"w": jnp.ones(2)}),
}


@pytest.mark.parametrize("name", LEAVES)
def test_each_reads_what_the_other_wrote(name) -> None:
    tree = LEAVES[name]
    ours, theirs = OURS.serialization.to_bytes(tree), THEIRS.serialization.to_bytes(tree)
    assert ours == theirs
    for lib in (OURS, THEIRS):
        restored = lib.serialization.from_bytes(tree, ours)
        assert jax.tree.structure(restored) == jax.tree.structure(tree)
        assert str(restored) == str(THEIRS.serialization.from_bytes(tree, theirs))


def test_pieces_of_large_arrays(monkeypatch) -> None:
    tree = {"w": np.arange(30, dtype=np.float32).reshape(5, 6), "v": jnp.ones((3, 3))}
    encoded = []
    for lib in (OURS, THEIRS):
        monkeypatch.setattr(lib.serialization, "MAX_CHUNK_SIZE", 32)
        encoded.append(lib.serialization.msgpack_serialize(tree))
    assert encoded[0] == encoded[1]


@pytest.mark.parametrize("by_orbax", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_checkpoints_of_the_other_are_read(tmp_path, by_orbax) -> None:
    tree = {"w": jnp.arange(3.0), "layers": [np.ones(2), 5]}
    like = {"w": jnp.zeros(3), "layers": [np.zeros(2), 0]}
    for writer, reader in ((OURS, THEIRS), (THEIRS, OURS)):
        folder = tmp_path / writer.struct.__name__
        with writer.configurations.config.temp_flip_flag("use_orbax_checkpointing", by_orbax):
            writer.checkpoints.save_checkpoint(folder, tree, 7)
        jax.tree.map(np.testing.assert_array_equal, reader.checkpoints.restore_checkpoint(folder, like), tree)


# ---------------------------------------------------------------- the same results, written out

NESTED = {"b": {"kernel": 1, "bias": 2}, "a": {"c": {}, "d": [3, {"e": 4}]}, "n": None}


def early(lib):
    stopping, seen = lib.early_stopping.EarlyStopping(min_delta=0.1, patience=1), []
    for metric in (1.0, 0.95, 0.8, 0.8, 0.79, 0.78, 0.1, float("nan")):
        stopping = stopping.update(metric)
        seen.append(str(stopping))
    return seen


def scales(lib):
    scaler, seen = lib.dynamic_scale.DynamicScale(growth_interval=2, scale=8.0), []
    for x in (1.0, 1.0, 1.0, jnp.inf, jnp.nan, 1.0):
        result = scaler.value_and_grad(lambda x: jnp.sum(x**2), has_aux=False)(jnp.array([x, 2.0]))
        scaler = result.dynamic_scale
        seen.append(result)
    return seen


def training(lib):
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"s": jnp.ones(1)}}
    state = lib.train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    for _ in range(2):
        state = state.apply_gradients(grads=jax.tree.map(lambda x: x + 1, state.params))
    return state.step, state.params, state.opt_state


def rates(lib):
    make = lib.lr_schedule
    schedules = (
        make.create_constant_learning_rate_schedule(0.1, 10, 2.0),
        make.create_stepped_learning_rate_schedule(0.1, 10, [[1, 0.1], [3, 0.01]], 0.5),
        make.create_cosine_learning_rate_schedule(0.1, 10, 5, 1.0),
    )
    return [[schedule(step) for step in (0, 4, 10, 11, 30, 31, 70)] for schedule in schedules]


def scans(lib):
    def body(carry, x):
        return carry + x.sum(), {"y": x * carry}

    xs = jnp.arange(24.0).reshape(2, 3, 4)
    scan = lib.jax_utils.scan_in_dim
    return [scan(body, 0.0, xs, axis, keepdims=keep) for axis in (0, -1, (2, 0), (0, 1, 2)) for keep in (False, True)]


def edits(lib):
    tree = {"p": Pair(1, 2), "l": [1, (2, 3)], "f": lib.frozen_dict.FrozenDict(g={"h": 1})}
    c = lib.cursor.cursor(tree)
    c["p"].x = 10
    c["l"][1][0] += 5
    c["f"]["g"]["h"] = 7
    updated = lib.cursor.cursor(tree).apply_update(lambda path, x: 0 if path.endswith("1") else x)
    found = [place._path for place in lib.cursor.cursor(tree).find_all(lambda path, _: "1" in path or "x" in path)]
    return c, c.build(), updated.build(), found


CASES = {
    "flat": lambda lib: lib.traverse_util.flatten_dict(NESTED),
    "flat, joined": lambda lib: lib.traverse_util.flatten_dict(NESTED, keep_empty_nodes=True, sep="/"),
    "flat, leaves": lambda lib: lib.traverse_util.flatten_dict(NESTED, is_leaf=lambda path, x: "bias" in x),
    "by path": lambda lib: lib.traverse_util.path_aware_map(lambda path, x: (path, x), NESTED),
    "frozen": lambda lib: lib.frozen_dict.freeze(NESTED),
    "frozen arrays": lambda lib: lib.frozen_dict.FrozenDict({"x": {"y": np.ones((2, 2))}}),
    "pretty": lambda lib: lib.frozen_dict.pretty_repr({"x": lib.frozen_dict.freeze(NESTED)}, 2),
    "thawed": lambda lib: lib.frozen_dict.unfreeze(lib.frozen_dict.freeze(NESTED)),
    "frozen leaves": lambda lib: jax.tree_util.tree_flatten_with_path(lib.frozen_dict.freeze(NESTED))[0],
    "early stopping": early,
    "dynamic scale": scales,
    "train state": training,
    "learning rates": rates,
    "one-hot": lambda lib: lib.common_utils.onehot(jnp.array([[0, 5], [2, -1]]), 3, 2.0, -1.0),
    "shards": lambda lib: lib.common_utils.shard(np.arange(32.0).reshape(16, 2)),
    "keys": lambda lib: jax.random.key_data(lib.common_utils.shard_prng_key(jax.random.key(3))),
    "replicas": lambda lib: lib.jax_utils.replicate({"w": jnp.arange(2), "b": 1.0}),
    "replica": lambda lib: lib.jax_utils.unreplicate(lib.jax_utils.replicate({"w": jnp.arange(2), "b": 1.0})),
    "partly known": lambda lib: lib.jax_utils.partial_eval_by_shape(lambda x: (jnp.ones(x.shape), x * 2), [(2, 3)]),
    "padded": lambda lib: lib.jax_utils.pad_shard_unpad(lambda p, x: p * x)(2, np.arange(11.0), min_device_batch=3),
    "scans": scans,
    "cursors": edits,
    "sizes": lambda lib: [lib.typing.SizeBytes(3, n) for n in (4, 999, 1000, 12345678, 10**13)],
    "order of names": lambda lib: lib.checkpoints.natural_sort(["f_10", "f_2", "f_-1", "f_1e3", "f_0.5", "g"]),
    "paths": lambda lib: [lib.checkpoints.safe_normpath(path) for path in ("gs://a//b/../c", "./a//b", "/a/./b/")],
    "old names": lambda lib: lib.checkpoints.convert_pre_linen({"Dense_12": {"Conv_3": 1}, "Dense_2": 2, "x": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_text(name) -> None:
    with np.printoptions(precision=5):
        assert str(CASES[name](OURS)) == str(CASES[name](THEIRS))


MISTAKES = {
    "a flat number": lambda lib: lib.traverse_util.flatten_dict(3),
    "a nested list": lambda lib: lib.traverse_util.unflatten_dict([1]),
    "writing": lambda lib: lib.frozen_dict.freeze({}).__setitem__("a", 1),
    "copying": lambda lib: lib.frozen_dict.copy(3),
    "a short list": lambda lib: lib.serialization.from_state_dict({"a": [1, 2]}, {"a": {"0": 1}}),
    "a lacking key": lambda lib: lib.serialization.from_state_dict({"a": {"b": 1}}, {"a": {}}),
    "other fields": lambda lib: lib.serialization.from_state_dict(Pair(1, 2), {"x": 1}),
    "a set": lambda lib: lib.serialization.to_bytes({1}),
    "objects": lambda lib: lib.serialization.to_bytes(np.array([object()])),
    "cut short": lambda lib: lib.serialization.msgpack_restore(b"\x92\x01"),
    "uneven": lambda lib: lib.jax_utils.pad_shard_unpad(max)(0, np.ones(2), np.ones(3)),
    "no such step": lambda lib: lib.checkpoints.restore_checkpoint("/nonexistent", None, step=3),
    "no such key": lambda lib: lib.cursor.cursor({})["x"],
    "no such attribute": lambda lib: lib.cursor.cursor({}).x,
    "no loop over a dict": lambda lib: list(lib.cursor.cursor({})),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_same_class_of_error(name) -> None:
    with pytest.raises(Exception) as theirs:
        MISTAKES[name](THEIRS)
    with pytest.raises(theirs.type):
        MISTAKES[name](OURS)
