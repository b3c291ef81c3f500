# SPDX-License-Identifier: Apache-2.0
"""Views of a model, and the values that a call leaves behind."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batiste import nnx


class Gate(nnx.Module):
    def __init__(self):
        self.open = False
        self.weight = nnx.Param(jnp.ones(()))

    def set_view(self, open: bool | None = None):
        """Opens or closes the gate.

        Args:
          open: whether anything
            passes.
        """
        if open is not None:
            self.open = open

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.perturb("noise", x * self.weight)


class Pair(nnx.Module):
    def __init__(self):
        self.gates = nnx.List([Gate(), Gate()])

    def __call__(self, x):
        for gate in self.gates:
            x = gate(x)
        return x


def test_a_view_shares_variables_and_has_its_own_modes():
    pair = Pair()
    view = nnx.view(pair, open=True)
    assert [g.open for g in view.gates] == [True, True] and [g.open for g in pair.gates] == [False, False]
    assert view.gates[0] is not pair.gates[0] and view.gates[0].weight is pair.gates[0].weight
    one = nnx.view(pair, open=True, only=nnx.PathContains(1))
    assert [g.open for g in one.gates] == [False, True]


def test_an_option_that_nobody_takes_is_an_error():
    with pytest.raises(ValueError, match=r"Unused keys.*no_such"):
        nnx.view(Pair(), no_such=1)
    assert nnx.view(Pair(), no_such=1, raise_if_not_found=False).gates[0].open is False


def test_view_info_documents_the_options():
    assert nnx.view_info(Pair()) == "Gate:\n  open: bool | None = None\n    whether anything\n    passes."


def test_with_attributes():
    pair = Pair()
    new = nnx.with_attributes(pair, open=5)
    assert new.gates[1].open == 5 and pair.gates[1].open is False and new.gates[1].weight is pair.gates[1].weight
    with pytest.raises(ValueError, match="no_such"):
        nnx.with_attributes(pair, no_such=5)


def test_capture_collects_by_type_and_leaves_nothing_behind():
    pair = Pair()
    y, seen, noise = nnx.capture(pair, nnx.Intermediate, nnx.BatchStat)(jnp.ones(2))
    assert nnx.to_flat_state(seen).paths == (("gates", 0, "seen"), ("gates", 1, "seen")) and len(noise) == 0
    assert not any("__captures__" in vars(m) for _, m in nnx.iter_modules(pair))
    np.testing.assert_array_equal(y, jnp.ones(2))


def test_capture_cleans_up_after_an_error():
    pair = Pair()

    def broken(pair):
        pair(jnp.ones(2))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        nnx.capture(broken, nnx.Intermediate)(pair)
    assert not any("__captures__" in vars(m) for _, m in nnx.iter_modules(pair))


def test_gradients_of_intermediates():
    pair = Pair()
    pair.gates[1].weight[...] = 3.0
    x = jnp.ones(2)
    _, zeros = nnx.capture(pair, nnx.Perturbation)(x)

    def loss(zeros, pair):
        y, seen = nnx.capture(pair, nnx.Intermediate, init=zeros)(x)
        return y.sum(), seen

    grads, seen = nnx.grad(loss, has_aux=True)(zeros, pair)
    np.testing.assert_array_equal(grads["gates"][0]["noise"][...], [3.0, 3.0])
    np.testing.assert_array_equal(grads["gates"][1]["noise"][...], [1.0, 1.0])
    assert list(seen["gates"][0]) == ["seen"]


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_capture_through_jit(where):
    pair, x = Pair(), jnp.ones(2)
    if where == "inside":
        _, seen = nnx.jit(lambda p, x: nnx.capture(p, nnx.Intermediate)(x))(pair, x)
    else:
        _, seen = nnx.capture(nnx.jit(lambda p, x: p(x)), nnx.Intermediate)(pair, x)
    np.testing.assert_array_equal(seen["gates"][1]["seen"].get_value()[0], x)


def test_outputs_of_methods():
    pair = Pair()
    call = Gate.__call__
    _, seen = nnx.capture(pair, nnx.Intermediate, method_outputs=nnx.Intermediate)(jnp.ones(2))
    assert ("gates", 0, "__call__") in nnx.to_flat_state(seen).paths and ("__call__",) in nnx.to_flat_state(seen).paths
    assert Gate.__call__ is call


def test_sow_outside_of_capture_warns_and_keeps_the_values():
    gate = Gate()
    with pytest.warns(DeprecationWarning, match="sow"):
        gate.sow(nnx.Intermediate, "h", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gate.sow("intermediates", "h", 2)
        assert gate.h.get_value() == (1, 2)
        with pytest.raises(ValueError, match="of type"):
            gate.sow(nnx.Intermediate, "weight", 2)
        with pytest.raises(ValueError, match="to be a Variable"):
            gate.sow(nnx.Intermediate, "open", 2)


def test_with_metadata_reaches_the_variable():
    init = nnx.with_metadata(jax.nn.initializers.zeros, note="here")
    v = nnx.Param(init(jax.random.key(0), (2,), jnp.float32))
    assert v.note == "here" and v.shape == (2,)
