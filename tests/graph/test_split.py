# SPDX-License-Identifier: Apache-2.0
"""split, merge, update, pop and States by filters."""

import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx
from batiste.graph.errors import StateMismatchWarning, StructureError
from tests.graph.zoo import zoo


def test_every_leaf_goes_to_the_first_filter_that_matches():
    stack = zoo(nnx)["stack"]
    _, params, stats = nnx.split(stack, nnx.Param, ...)
    assert set(params) == {"layers", "named"} and list(nnx.to_flat_state(stats).paths) == [("named", "last")]
    assert len(nnx.to_flat_state(params)) == 26


def test_a_leaf_without_a_filter_is_an_error():
    with pytest.raises(StructureError, match="Non-exhaustive"):
        nnx.split(zoo(nnx)["stack"], nnx.Param)


@pytest.mark.parametrize("position", [0, 1])
def test_everything_must_come_last(position):
    filters = [nnx.Param, nnx.BatchStat]
    filters.insert(position, ...)
    with pytest.raises(ValueError, match="last"):
        nnx.split(zoo(nnx)["stack"], *filters)


def test_merge_names_missing_and_unknown_paths():
    graphdef, state = nnx.split(zoo(nnx)["layer"])
    with pytest.raises(StructureError, match="missing: kernel"):
        nnx.merge(graphdef, nnx.filter_state(state, nnx.PathContains("bias")))
    with pytest.raises(StructureError, match="unknown: other"):
        nnx.merge(graphdef, state, nnx.State({"other": nnx.Param(1)}))


def test_merge_takes_plain_dicts():
    layer = zoo(nnx)["layer"]
    graphdef, state = nnx.split(layer)
    again = nnx.merge(graphdef, nnx.to_pure_dict(state))
    np.testing.assert_array_equal(again.kernel, layer.kernel)
    assert again.bias.note == "b" and again.bias is not layer.bias


@pytest.mark.parametrize("form", ["state", "dict", "pure", "module", "flat"])
def test_update_writes_into_the_same_variables(form):
    layer, other = zoo(nnx)["layer"], zoo(nnx)["layer"]
    other.kernel[...] = 7.0
    state = nnx.state(other)
    given = {"state": state, "dict": {"kernel": other.kernel}, "pure": nnx.to_pure_dict(state), "module": other,
             "flat": nnx.to_flat_state(state)}[form]  # fmt: skip
    before = layer.kernel
    nnx.update(layer, given)
    assert layer.kernel is before and float(layer.kernel[1, 2]) == 7.0


def test_update_adds_what_is_new_and_sets_what_is_plain():
    layer = zoo(nnx)["layer"]
    with pytest.warns(StateMismatchWarning, match="adds 'extra' to the "):
        nnx.update(layer, {"extra": jnp.ones(1), "n": 9})
    assert layer.n == 9 and layer.extra.shape == (1,)


def test_pop_takes_variables_out():
    stack = zoo(nnx)["stack"]
    stats = nnx.pop(stack, nnx.BatchStat)
    assert list(nnx.to_flat_state(stats).paths) == [("named", "last")] and "last" not in stack.named
    assert len(nnx.to_flat_state(nnx.pop(stack, nnx.BatchStat))) == 0
    with pytest.raises(ValueError, match="at least one filter"):
        nnx.pop(stack)


def test_pop_of_a_shared_variable_leaves_it_nowhere_silently():
    shared = zoo(nnx)["shared"]
    kernel = shared.a.kernel
    state = nnx.pop(shared.a, nnx.Param)
    assert nnx.to_flat_state(state).leaves[1] is kernel and not hasattr(shared.b, "kernel") and shared.p is kernel


def test_unpack_carries_its_structure():
    layer = zoo(nnx)["layer"]
    params = nnx.unpack(layer)
    assert nnx.merge(params).kernel is layer.kernel
    a, b = nnx.unpack(layer, nnx.PathContains("kernel"), ...)
    assert set(a) == {"kernel"} and set(b) == {"bias"} and nnx.merge(a, b).n == 2
