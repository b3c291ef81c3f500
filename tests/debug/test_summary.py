# SPDX-License-Identifier: Apache-2.0
"""Tables of models: rows, columns, texts, costs, and that the model is left as it was."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batiste import nnx
from batiste.debug import cost
from batiste.debug.show import display
from batiste.debug.summary import CallInfo, tabulate
from batiste.graph.errors import ArgumentError

PLAIN = {"force_terminal": False, "width": 160}


def rows(obj, *args, **kwargs) -> dict[str, list[str]]:
    """The lines of each row's cells, by path, without the frame."""
    table = tabulate(obj, *args, console_kwargs=PLAIN, **kwargs).splitlines()
    found: dict[str, list[str]] = {}
    name = None
    for line in table:
        if line.startswith(("├", "┡")):
            name = None
        elif line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if name is None:
                name = cells[0] if "Total" not in cells else "Total"
                found[name] = []
            found[name].append("|".join(cells[1:]))
    return found


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.linear(x)))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = Block(rngs)
        self.head = nnx.Linear(8, 2, use_bias=False, rngs=rngs)
        self.same = self.head
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32), note="x")
        self.scales = nnx.List([nnx.Param(jnp.ones(3)), nnx.Param(None)])

    def __call__(self, x, *, mode="train"):
        self.calls[...] += 1
        return {"logits": self.same(self.block(x)), "mode": mode, "more": [x, None]}

    def encode(self, x):
        return self.block(x)


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


X = jnp.ones((5, 4))


def test_a_row_per_part_in_the_order_of_the_calls_with_its_variables(model):
    table = rows(model, X)
    assert list(table) == ["", "block", "block/linear", "block/dropout", "head", "Total"]
    assert table["block/linear"] == [
        "Linear|float32[5,4]|float32[5,8]||bias: float32[8]|",
        "||||kernel: float32[4,8]|",
        "|||||",
        "||||40 (160 B)|",
    ]
    assert table["block/dropout"] == ["Dropout|float32[5,8]|float32[5,8]|||2 (12 B)"]
    assert table["Total"] == ["||Total|1 (4 B)|59 (236 B)|2 (12 B)"]


def test_outputs_metadata_and_containers_are_outlined(model):
    table = rows(model, X)[""]
    assert [line.split("|")[2] for line in table] == [
        "logits: float32[5,2]",
        "mode: train",
        "more:",
        "- float32[5,4]",
        "- None",
    ]
    assert [line.split("|")[3] for line in table] == ["calls:", "note: x", "value: int32[]", "", "1 (4 B)"]
    assert table[0].split("|")[4] == "scales/0: float32[3]"


def test_inputs_are_shown_as_they_were_passed(model):
    def inputs(*args, **kwargs):
        class Any(nnx.Module):
            def __call__(self, *args, **kwargs):
                """Takes anything."""

        return [line.split("|")[1] for line in rows(Any(), *args, **kwargs)[""]]

    assert inputs(X) == ["float32[5,4]"]
    assert inputs(X, True) == ["- float32[5,4]", "- True"]
    assert inputs(X, y={"k": X, "l": [1, "[bold]"]}, z=None) == [
        "- float32[5,4]",
        "y:",
        "k: float32[5,4]",
        "l:",
        "- 1",
        "- [bold]",
        "z: None",
    ]
    assert inputs({}, rngs=nnx.Rngs(0)) == ["- {}", "rngs: Rngs"]
    assert inputs(jax.ShapeDtypeStruct((2,), jnp.bfloat16), np.zeros(3)) == ["- bfloat16[2]", "- float32[3]"]
    assert inputs() == [""]


def test_depth_and_filter_choose_rows(model):
    assert list(rows(model, X, depth=0)) == ["", "Total"]
    assert list(rows(model, X, depth=1)) == ["", "block", "head", "Total"]
    seen: list[CallInfo] = []
    assert list(rows(model, X, row_filter=lambda row: seen.append(row) or row.type is Block)) == ["block", "Total"]
    paths = ["/".join(row.path) for row in seen]
    assert paths == ["", "block", "block/linear", "block/dropout", "block/dropout/rngs", "head"]


def test_another_method_stands_in_the_path_and_calls_that_differ_get_rows():
    class Twice(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def part(self, x, flag=None):
            return self.linear(x)

        def __call__(self, x):
            return self.part(x) + self.part(x, flag={}) + self.part(x) + self.linear(x[:2]).sum()

    lines = tabulate(Twice(), X, console_kwargs=PLAIN).splitlines()
    assert sum("│ part " in line for line in lines) == 2
    assert sum("│ linear " in line for line in lines) == 2
    assert list(rows(Twice(), X, method="part")) == ["part", "linear", "Total"]


def test_the_model_is_called_on_shapes_alone_and_left_as_it_was(model):
    ran = []

    class Noisy(nnx.Module):
        def __call__(self, x):
            ran.append(isinstance(x, jax.core.Tracer))
            return x

    method, before = Block.__call__, jax.tree.leaves(nnx.state(model))
    tabulate(nnx.Sequential(Noisy(), Noisy()), X, compute_flops=True, compute_vjp_flops=True)
    assert ran == [True, True], "traced once, also for the costs"
    tabulate(model, X)
    assert Block.__call__ is method
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model))))


def test_classes_are_restored_after_an_error(model):
    method = nnx.Linear.__call__
    with pytest.raises(Exception, match="Linear"):
        tabulate(model, jnp.ones((5, 3)))
    assert nnx.Linear.__call__ is method
    assert "block" in rows(model, X)


def test_an_object_that_is_not_called_is_listed(model):
    optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    table = rows(optimizer)
    assert table["Total"] == ["||Total|1 (4 B)|9 (36 B)"]
    assert "opt_state/0/trace/kernel: float32[2,3]" in table[""][1]
    assert list(rows({"a": model.block, "b": model.head})) == ["a", "a/dropout", "a/linear", "b", "Total"]
    with pytest.raises(ArgumentError, match="Optimizer has no method '__call__' to call"):
        tabulate(optimizer, X)
    with pytest.raises(ArgumentError, match="Linear has no method 'nope'"):
        tabulate(model.head, X, method="nope")


def test_abstract_models_are_shown():
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    assert rows(abstract, X)["Total"] == ["||Total|1 (4 B)|59 (236 B)|2 (12 B)"]


def test_tables_are_styled_and_options_override():
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    styled = tabulate(linear, jnp.ones((1, 2)))
    assert "\x1b[2mfloat32\x1b[0m[1,2]" in styled
    options = {"table_kwargs": {"title": "Hello"}, "column_kwargs": {"justify": "right"}}
    plain = tabulate(linear, jnp.ones((1, 2)), console_kwargs=PLAIN, **options)
    assert "Hello" in plain
    assert re.search(r"│ {10,}9 \(36 B\) │", plain)
    assert "Total Parameters: 9 (36 B)" in plain


# ---------------------------------------------------------------- costs


def test_costs_of_known_operations():
    table = rows(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((3, 2)), compute_flops=True, compute_vjp_flops=True)
    product, addition = 2 * 3 * 2 * 3, 3 * 3
    sum_over_rows = 2 * 3
    flops, vjp_flops = table[""][0].split("|")[3:5]
    assert int(flops) == product + addition
    assert int(vjp_flops) == 3 * product + addition + sum_over_rows


def test_costs_add_up_over_parts_also_inside_jit_scan_and_vmap():
    class Loop(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            x = jax.jit(self.inner)(x)
            x = jax.lax.scan(lambda c, _: (self.inner(c[:2]), None), x[:2], None, length=3)[0]
            return jax.vmap(self.inner)(x)

    lines = tabulate(Loop(), X, compute_flops=True, console_kwargs=PLAIN).splitlines()
    costs = [int(cells[5]) for line in lines if len(cells := line.split("│")) > 6 and cells[2].strip() == "Linear"]
    assert costs == [2 * 5 * 4 * 4, 2 * 2 * 4 * 4, 2 * 2 * 4 * 4], "once for a scan's step, for all of a map"


def test_a_part_without_arithmetic_is_free_and_one_traced_in_vain_is_unknown():
    jaxpr = jax.make_jaxpr(lambda x: cost.marked("call_0", lambda: x, is_leaf=lambda x: False))(1.0).jaxpr
    assert cost.flops(cost.region(jaxpr, "call_0")) == 0
    assert cost.region(jaxpr, "call_1") is None


def test_display_prints_outside_a_notebook(capsys):
    display(nnx.Param(1), "text")
    assert capsys.readouterr().out == "Param(\n  value=1\n)\ntext\n"
