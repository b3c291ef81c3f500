# SPDX-License-Identifier: Apache-2.0
"""Random streams: which key comes when, what stands in for a missing stream, and who may draw."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste.graph import Variable, iter_graph, merge, split, state
from batiste.graph.errors import RngError, TraceContextError
from batiste.graph.rng import MissingStreamError, RngCount, RngKey, Rngs, RngState, RngStream


def data_of(keys):
    return jax.random.key_data(keys).tolist()


def key_of(seed, *counts):
    key = jax.random.key(seed)
    for count in counts:
        key = jax.random.fold_in(key, count)
    return data_of(key)


def counts(rngs):
    return {name: np.asarray(stream.count.get_value()).tolist() for name, stream in rngs.items()}


def test_a_stream_folds_its_count_into_its_key():
    stream = RngStream(3, tag="noise")
    assert [data_of(stream()) for _ in range(4)] == [key_of(3, n) for n in range(4)]
    assert stream.count[...].dtype == jnp.uint32
    assert int(stream.count[...]) == 4
    assert data_of(stream.key[...]) == key_of(3)


def test_streams_do_not_disturb_each_other():
    rngs = Rngs(0, params=1, dropout=2)
    drawn = [data_of(rngs.dropout()), data_of(rngs()), data_of(rngs.dropout()), data_of(rngs.params())]
    assert drawn == [key_of(2, 0), key_of(0, 0), key_of(2, 1), key_of(1, 0)]
    assert counts(rngs) == {"params": 1, "dropout": 2, "default": 1}


def test_default_stands_in_for_a_missing_stream():
    rngs = Rngs(0)
    drawn = [data_of(rngs.params()), data_of(rngs["dropout"]()), data_of(rngs())]
    assert drawn == [key_of(0, n) for n in range(3)]
    assert "params" not in rngs
    assert list(rngs) == ["default"]


def test_a_stream_that_is_added_is_used_from_then_on():
    rngs = Rngs(0)
    rngs.noise = RngStream(5, tag="noise")
    assert data_of(rngs.noise()) == key_of(5, 0)
    assert list(rngs) == ["default", "noise"]


@pytest.mark.parametrize("seed", [0, 7, True])
def test_a_seed_a_key_and_a_raw_key_are_the_same(seed):
    expected = key_of(seed, 0)
    assert data_of(Rngs(seed)()) == expected
    assert data_of(Rngs(jax.random.key(seed))()) == expected
    assert data_of(Rngs(jax.random.PRNGKey(seed))()) == expected


def test_the_parts_are_variables_with_kinds_and_tags():
    rngs = Rngs(params=0, dropout=1)
    found = {path: x for path, x in iter_graph(rngs) if isinstance(x, Variable)}
    assert {path: (type(x), x.tag) for path, x in found.items()} == {
        ("params", "key"): (RngKey, "params"),
        ("params", "count"): (RngCount, "params"),
        ("dropout", "key"): (RngKey, "dropout"),
        ("dropout", "count"): (RngCount, "dropout"),
    }
    assert all(isinstance(x, RngState) for x in found.values())
    assert list(state(rngs, "dropout")) == ["dropout"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r)), lambda r: merge(*split(r), copy=True)]
)
def test_a_copy_goes_on_alone_from_where_it_was(copied):
    rngs = Rngs(0)
    rngs()
    new = copied(rngs)
    assert data_of(new()) == key_of(0, 1)
    assert counts(rngs) == {"default": 1}


# ---------------------------------------------------------------- deriving streams
def test_fork_draws_one_key_for_each_stream():
    rngs = Rngs(0, noise=1)
    rngs.noise()
    forked = rngs.fork()
    assert data_of(forked.noise()) == key_of(1, 1, 0)
    assert data_of(forked()) == key_of(0, 0, 0)
    assert counts(rngs) == {"noise": 2, "default": 1}


def test_split_keys_differ_and_broadcast_keys_do_not():
    rngs = Rngs(0).split(4)
    drawn = jax.vmap(lambda r: (r(), r))(rngs)[0]
    assert len({tuple(k) for k in data_of(drawn)}) == 4
    same = jax.vmap(lambda r: (r(), r))(Rngs(0).broadcast(4))[0]
    assert data_of(same) == [key_of(0, 0, 0)] * 4


@pytest.mark.parametrize("shape", [3, (3,), (2, 3), ()])
def test_shapes_of_keys_and_counts(shape):
    expected = (shape,) if isinstance(shape, int) else shape
    for derived in (Rngs(0).split(shape).default, Rngs(0).broadcast(shape).default):
        assert derived.key.shape == derived.count.shape == expected


def test_the_first_filter_that_matches_counts():
    rngs = Rngs(params=0, dropout=1, noise=2).split({"params": None, ...: (2, 1)})
    assert [stream.key.shape for _, stream in rngs.items()] == [(), (2, 1), (2, 1)]


def test_fork_to_a_shape_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use the 'split' method"):
        assert RngStream(0, tag="a").fork(split=2).key.shape == (2,)


def test_filters_see_the_stream_and_its_tag():
    seen = []
    Rngs(a=0).split({lambda path, x: seen.append((path, type(x), x.tag)): 2})
    assert seen == [((), RngStream, "a")]


# ---------------------------------------------------------------- drawing values
def test_values_are_drawn_from_the_streams_keys():
    rngs = Rngs(0, noise=1)
    np.testing.assert_array_equal(rngs.normal((3,)), jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (3,)))
    np.testing.assert_array_equal(
        rngs.noise.randint((3,), 0, 9), jax.random.randint(jax.random.fold_in(jax.random.key(1), 0), (3,), 0, 9)
    )
    assert counts(rngs) == {"noise": 1, "default": 1}


def test_an_initializer_draws_a_key_at_each_call():
    rngs = Rngs(0)
    initializer = rngs.lecun_normal()
    assert counts(rngs) == {"default": 0}
    expected = jax.nn.initializers.lecun_normal()(jax.random.fold_in(jax.random.key(0), 1), (2, 3), jnp.float32)
    initializer((2, 3))
    np.testing.assert_array_equal(initializer((2, 3), jnp.float32), expected)
    assert counts(rngs) == {"default": 2}


# ---------------------------------------------------------------- traces
def test_streams_go_through_jax_as_pytrees():
    rngs = Rngs(0)
    key, rngs = jax.jit(lambda r: (r(), r))(rngs)
    assert data_of(key) == key_of(0, 0)
    assert data_of(rngs()) == key_of(0, 1)


def test_a_stream_made_inside_a_program_draws_inside():
    assert data_of(jax.jit(lambda: Rngs(5)())()) == key_of(5, 0)


def test_drawing_leaves_nothing_but_the_draw_in_a_program():
    program = jax.make_jaxpr(lambda key: RngStream(key, tag="a")())(jax.random.key(0))
    assert str(program).count("random_fold_in") == 1
    assert all(e.params["inline"] for e in program.eqns if str(e.primitive) == "jit")  # JAX 0.11.2 inlines them later


def test_a_stream_from_outside_cannot_be_drawn_from_inside():
    rngs = Rngs(0)
    with pytest.raises(TraceContextError, match="Cannot mutate RngCount from a different trace level"):
        jax.jit(lambda: rngs())()
    assert data_of(rngs()) == key_of(0, 0)


def test_a_stream_from_inside_cannot_be_drawn_from_outside():
    leaked = []
    jax.jit(lambda: leaked.append(Rngs(jax.random.key(0))))()
    with pytest.raises(TraceContextError):
        leaked[0]()


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "value",
    [1.5, "a", [1, 2], np.int32(3), jnp.array(3), jnp.array(3.0), jnp.uint32(3), Rngs(0), Variable(jax.random.key(0))],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_key(value):
    with pytest.raises(RngError, match="Invalid rng value"):
        Rngs(params=value)


def test_a_missing_stream_names_those_that_are_there():
    rngs = Rngs(params=0, noise=1)
    with pytest.raises(MissingStreamError) as info:
        rngs.dropout()
    assert str(info.value) == (
        "No RngStream named 'dropout' found in Rngs: got the streams ['params', 'noise'].\n"
        "  Fix: write Rngs(dropout=seed) for this stream, or Rngs(seed) for a default that stands in for all"
    )


@pytest.mark.parametrize("kind", [AttributeError, KeyError, RngError, ValueError])
def test_a_missing_stream_is_caught_as_what_it_is(kind):
    for get in (lambda r: r.dropout, lambda r: r["dropout"], lambda r: r(), lambda r: r.normal((2,))):
        with pytest.raises(kind, match="No RngStream named"):
            get(Rngs(params=0))
    assert not hasattr(Rngs(params=0), "dropout")


def test_no_stream_stands_in_for_private_names():
    assert not hasattr(Rngs(0), "_repr_html_")
    assert not hasattr(Rngs(0), "__array__")


def test_a_stream_that_was_split_is_not_drawn_from():
    for draw in (
        lambda s: s(),
        lambda s: s.fork(),
        lambda s: s.split(2),
        lambda s: s.broadcast(2),
        lambda s: s.normal(),
    ):
        with pytest.raises(
            RngError, match=r"fold_in accepts a single key: stream 'a' was split: got keys of shape \(2,\)"
        ):
            draw(RngStream(0, tag="a").split(2))
