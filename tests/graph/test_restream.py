# SPDX-License-Identifier: Apache-2.0
"""Streams inside a model are changed in place and put back, or in a copy that shares all the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from batiste.graph import Module, Param, PathContains, set_graph_mode, set_graph_updates
from batiste.graph.errors import ArgumentError, RngError, TraceContextError
from batiste.graph.restream import backup_keys, fork_rngs, reseed, restore_rngs, split_rngs, with_rngs
from batiste.graph.rng import Rngs, RngStream


class Noisy(Module):
    def __init__(self, rngs):
        self.rngs = rngs
        self.inner = rngs.dropout.fork()
        self.weight = Param(rngs.params.normal((2,)))


def noisy():
    return Noisy(Rngs(0, dropout=1))


def shapes(model):
    return {
        "default": model.rngs.default.key.shape,
        "dropout": model.rngs.dropout.key.shape,
        "inner": model.inner.key.shape,
    }


def keys(model):
    streams = {"default": model.rngs.default, "dropout": model.rngs.dropout, "inner": model.inner}
    return {name: jax.random.key_data(stream.key[...]).tolist() for name, stream in streams.items()}


SCALAR = {"default": (), "dropout": (), "inner": ()}


# ---------------------------------------------------------------- in place
@pytest.mark.parametrize(
    ("only", "split"),
    [
        (..., {"default": (3,), "dropout": (3,), "inner": (3,)}),
        ("dropout", {"default": (), "dropout": (3,), "inner": (3,)}),
        (PathContains("inner"), {"default": (), "dropout": (), "inner": (3,)}),
        (None, SCALAR),
    ],
    ids=str,
)
def test_split_and_restored(only, split):
    model = noisy()
    before = keys(model)
    streams = model.rngs, model.inner
    with split_rngs(model, splits=3, only=only):
        assert shapes(model) == split
        assert (model.rngs, model.inner) == streams
    assert shapes(model) == SCALAR
    assert keys(model) == before


def test_two_rounds_give_different_keys():
    model, seen = noisy(), []
    for _ in range(2):
        with split_rngs(model, splits=2):
            seen.append(keys(model))
    assert all(seen[0][name] != seen[1][name] for name in seen[0])


def test_forked_and_restored():
    model = noisy()
    with fork_rngs(model):
        inside = [model.rngs(), model.inner()]
    outside = [model.rngs(), model.inner()]
    assert all(a != b for a, b in zip(inside, outside))


def test_an_exception_puts_streams_back():
    model = noisy()
    for change in (lambda: split_rngs(model, splits=2), lambda: fork_rngs(model)):
        before = keys(model)
        with pytest.raises(KeyError), change():
            raise KeyError
        assert keys(model) == before


def test_an_error_on_the_way_leaves_every_stream_with_its_key():
    model = noisy()
    model.inner = model.inner.split(2)
    before = keys(model)
    with pytest.raises(RngError, match="was split"):
        split_rngs(model, splits=3)
    assert keys(model) == before


def test_a_shared_stream_is_split_once():
    rngs = Rngs(0)
    backups = split_rngs([rngs, {"again": rngs}, rngs.default], splits=2)
    assert rngs.default.key.shape == (2,)
    assert len(list(backups)) == 1


def test_keys_alone_can_be_backed_up():
    model = noisy()
    backups, before = backup_keys(model), keys(model)
    reseed(model, dropout=5, default=6)
    assert keys(model) != before
    restore_rngs(backups)
    assert keys(model) == before


def test_one_split_can_be_squeezed():
    rngs = Rngs(0)
    split_rngs(rngs, splits=1, squeeze=True)
    assert rngs.default.key.shape == rngs.default.count.shape == ()


def test_fork_by_filters_takes_the_first_that_matches():
    model = noisy()
    with pytest.warns(DeprecationWarning, match="'split' argument of 'fork'"):
        fork_rngs(model, split={"dropout": 2, ...: None})
    assert shapes(model) == {"default": (), "dropout": (2,), "inner": (2,)}


# ---------------------------------------------------------------- copies
COPIES = {
    "split_rngs": lambda m, **modes: split_rngs(m, splits=3, **modes),
    "fork_rngs": lambda m, **modes: fork_rngs(m, **modes),
    "with_rngs": lambda m, **modes: with_rngs(m, fork=..., **modes),
}


@pytest.mark.parametrize(
    "modes", [{"graph": False}, {"graph_updates": False}, {"graph": True, "graph_updates": False}], ids=str
)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_has_new_streams_and_the_same_variables(name, modes):
    model = noisy()
    before = keys(model)
    new = COPIES[name](model, **modes)
    assert type(new) is Noisy
    assert new.weight is model.weight
    assert new.inner is not model.inner
    assert keys(model) == before
    assert all(keys(new)[stream] != before[stream] for stream in before)


def test_the_defaults_of_the_modes_count():
    with set_graph_mode(False):
        assert isinstance(split_rngs(noisy(), splits=2), Noisy)
    with set_graph_updates(False):
        assert isinstance(fork_rngs(noisy()), Noisy)


def test_a_shared_stream_stays_shared_in_a_copy():
    rngs = Rngs(0)
    new = split_rngs([rngs, rngs], splits=2, graph_updates=False)
    assert new[0] is new[1]
    with pytest.raises(ValueError, match="uplicate"):
        split_rngs([rngs, rngs], splits=2, graph=False)


def test_with_rngs_does_what_each_rule_says():
    rngs = with_rngs(
        Rngs(a=0, b=1, c=2, d=3),
        split={"a": 4},
        broadcast={"b": (2, 2)},
        fork="c",
        only=["a", "b", "c"],
        graph_updates=False,
    )
    assert {name: stream.key.shape for name, stream in rngs.items()} == {"a": (4,), "b": (2, 2), "c": (), "d": ()}
    assert rngs.c.key[...] == jax.random.fold_in(jax.random.key(2), 0)
    assert rngs.d.key[...] == jax.random.key(3)


# ---------------------------------------------------------------- decorators
def test_a_decorator_changes_all_arguments_for_the_call():
    @split_rngs(splits=3, only="dropout")
    def f(model, number, *, rngs):
        """Doc."""
        return shapes(model)["dropout"], number, rngs.dropout.key.shape

    model, rngs = noisy(), Rngs(dropout=5)
    assert f(model, 1, rngs=rngs) == ((3,), 1, (3,))
    assert shapes(model) == SCALAR
    assert rngs.dropout.key.shape == ()
    assert (f.__name__, f.__doc__) == ("f", "Doc.")


def test_a_decorator_without_updates_passes_copies():
    @fork_rngs(graph_updates=False)
    def f(model):
        return model

    model = noisy()
    assert f(model) is not model
    assert f(model).weight is model.weight


def test_a_decorator_works_on_methods():
    class Split(Module):
        @split_rngs(splits=2)
        def __init__(self, rngs):
            self.shape = rngs.params.key.shape

        @split_rngs(splits=3)
        def call(self, rngs):
            return rngs.params.key.shape

    rngs = Rngs(params=0)
    assert (Split(rngs).shape, Split(rngs).call(rngs), rngs.params.key.shape) == ((2,), (3,), ())


def test_a_decorated_function_can_be_mapped_inside():
    @split_rngs(splits=4)
    def draw(rngs):
        return jax.vmap(lambda r: (r.params.normal(), r))(rngs)[0]

    rngs = Rngs(params=0)
    first, second = draw(rngs), draw(rngs)
    assert len({*first.tolist(), *second.tolist()}) == 8


# ---------------------------------------------------------------- reseed
def test_streams_of_one_tag_get_different_new_keys():
    model = noisy()
    model.inner()
    reseed(model, dropout=42)
    new = RngStream(42, tag="dropout")
    assert [model.inner.key[...], model.rngs.dropout.key[...]] == [new(), new()]
    assert int(model.inner.count[...]) == 0
    assert model.rngs.default.key[...] == jax.random.key(0)


def test_reseed_by_policy():
    model = {"a": Rngs(noise=0).split((2, 3))}
    reseed(model, noise=1, policy="match_shape")
    assert jnp.all(model["a"].noise.key[...] == jax.random.split(jax.random.fold_in(jax.random.key(1), 0), (2, 3)))
    seen = []
    reseed(model, noise=1, policy=lambda path, key, shape: seen.append((path, shape)) or key)
    assert seen == [(("a", "noise"), (2, 3))]
    assert model["a"].noise.key.shape == model["a"].noise.count.shape == ()


def test_reseed_refuses_split_streams_and_leaves_all_as_they_were():
    model = noisy()
    model.rngs.dropout = model.rngs.dropout.split(3)
    before = keys(model)
    with pytest.raises(
        RngError, match=r"\('rngs', 'dropout'\) because it has a non-scalar key: got a key with shape \(3,\)"
    ):
        reseed(model, dropout=1)
    assert keys(model) == before


# ---------------------------------------------------------------- bad input
def test_bad_arguments():
    with pytest.raises(ArgumentError, match="squeeze=True is only supported for splits=1"):
        split_rngs(Rngs(0), splits=2, squeeze=True)
    with pytest.raises(ArgumentError, match="policy must be"):
        reseed(Rngs(0), policy="some")
    with pytest.raises(RngError, match="Invalid rng value"):
        reseed(Rngs(0), default=1.5)
    with pytest.raises(NotImplementedError, match="graph=True and graph_updates=True is not supported for `with_rngs`"):
        with_rngs(Rngs(0), split=2)
    with pytest.raises(ArgumentError, match=r"\('a',\) matches multiple rules: .*split matches filter 'a'"):
        with_rngs(Rngs(a=0), split={"a": 2}, fork="a", graph=False)


def test_streams_of_another_trace_are_left_alone():
    rngs = Rngs(0)
    with pytest.raises(TraceContextError):
        jax.jit(lambda: split_rngs(rngs, splits=2) and None)()
    assert rngs.default.key.shape == ()
