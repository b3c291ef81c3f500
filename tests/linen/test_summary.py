# SPDX-License-Identifier: Apache-2.0
"""Tables of the functional face: which calls have rows, whose variables stand in them, what they cost."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batiste.linen as nn
from batiste.linen import summary

PLAIN = {"force_terminal": False, "width": 200}
KEY = jax.random.key(0)
X = jnp.ones((3, 5))


def cells(text: str) -> list[list[str]]:
    """The first line of every row, head and foot included, as cells."""
    lines = text.splitlines()
    first = [here for above, here in pairwise(lines) if above.startswith(("┏", "┡", "├"))]
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in first]


def table(module: nn.Module, *args, **kwargs) -> list[list[str]]:
    return cells(module.tabulate(KEY, *args, console_kwargs=PLAIN, **kwargs))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, training: bool):
        return nn.relu(nn.BatchNorm(use_running_average=not training)(nn.Dense(4)(x)))


class Net(nn.Module):
    def setup(self):
        self.block = Block()
        self.head = nn.Dense(2)
        self.scale = self.param("scale", nn.initializers.ones, (2,))

    def encode(self, x, training):
        return self.block(x, training=training)

    def __call__(self, x, training):
        y = self.head(self.encode(x, training)) * self.scale[None]
        return {"y": y, "again": [self.head(jnp.ones((1, 4))), None]}


HEAD = ["path", "module", "inputs", "outputs", "batch_stats", "params"]
TOTAL = ["", "", "", "Total", "8 (32 B)", "44 (176 B)"]


def test_a_row_per_module_in_the_order_of_the_calls_with_its_own_variables():
    text = Net().tabulate(KEY, X, True, console_kwargs=PLAIN)
    assert cells(text) == [
        HEAD,
        ["", "Net", "- float32[3,5]", "again:", "", "scale: float32[2]"],
        ["block", "Block", "- float32[3,5]", "float32[3,4]", "", ""],
        ["block/Dense_0", "Dense", "float32[3,5]", "float32[3,4]", "", "bias: float32[4]"],
        ["block/BatchNorm_0", "BatchNorm", "float32[3,4]", "float32[3,4]", "mean: float32[4]", "bias: float32[4]"],
        ["head", "Dense", "float32[3,4]", "float32[3,2]", "", "bias: float32[2]"],
        TOTAL,
    ]
    assert "Net Summary" in text and "Total Parameters: 52 (208 B)" in text


def test_what_depth_hides_counts_in_the_row_above():
    assert table(Net(), X, True, depth=1)[2:] == [
        ["block", "Block", "- float32[3,5]", "float32[3,4]", "8 (32 B)", "32 (128 B)"],
        ["head", "Dense", "float32[3,4]", "float32[3,2]", "", "bias: float32[2]"],
        TOTAL,
    ]
    only = Net().tabulate(KEY, X, True, depth=0, console_kwargs=PLAIN)
    assert "44 (176 B)" in only and cells(only)[1][4:] == ["8 (32 B)", "scale: float32[2]"]


def test_repeated_calls_and_other_methods_have_rows_where_asked_for():
    rows = table(Net(), X, True, depth=1, show_repeated=True)
    assert [row[:2] for row in rows[1:-1]] == [
        ["", "Net"],
        ["", "Net (encode)"],
        ["block", "Block"],
        ["head", "Dense"],
        ["head", "Dense"],
    ]
    assert rows[5][2:] == ["float32[1,4]", "float32[1,2]", "", ""]
    assert [row[1] for row in table(Net(), X, True, method="encode", depth=1)[1:-1]] == ["Net (encode)", "Block"]


def test_costs_leave_the_initialisers_out():
    rows = table(nn.Dense(2), X, compute_flops=True, compute_vjp_flops=True)
    product, addition, sum_over_rows, parameters = 2 * 3 * 5 * 2, 3 * 2, 2 * 2, 5 * 2 + 2
    assert rows[0][4:6] == ["flops", "vjp_flops"]
    assert rows[1][4:6] == [str(product + addition), str(3 * product + addition + sum_over_rows + parameters)]
    with_parts = summary._get_module_table(Net(), None, True, True, False)(KEY, X, True)
    costs = {(row.path, row.method, row.inputs[0].shape[0] if isinstance(row.inputs, tuple) else row.inputs.shape[0]):
             row.flops for row in with_parts}  # fmt: skip
    assert costs[("head",), "__call__", 3] == 3 * costs[("head",), "__call__", 1] > 0
    assert costs[(), "encode", 3] == costs[("block",), "__call__", 3]


def test_shapes_stand_in_for_arrays_and_nothing_is_computed():
    seen = []

    class Watching(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(isinstance(x + 1, jax.core.Tracer))
            return nn.Dense(2)(x)

    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    assert table(Watching(), shape) == table(Watching(), X)
    assert seen == [True, True]


def test_rows_hold_the_values_behind_the_texts():
    rows = summary._get_module_table(Net(), 1, False, False, False)(KEY, X, training=True)
    assert isinstance(rows, summary.Table) and isinstance(rows.module, Net)
    assert rows.collections == ["batch_stats", "params"]
    net, block, head = rows
    assert net.inputs[1] == {"training": True} and net.outputs["y"].shape == (3, 2)
    assert net.module_variables["params"].keys() == {"scale"} and head.module_copy == nn.Dense(2)
    assert block.module_variables == {}
    assert block.counted_variables["params"]["Dense_0"]["kernel"].shape == (5, 4)
    assert block.size_and_bytes(["params", "none"]) == {"params": (32, 128), "none": (0, 0)}


def test_sown_values_other_collections_and_plain_numbers_are_listed():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "h", x)
            if self.is_mutable_collection("cache"):
                self.variable("cache", "nested", lambda: {"a": jnp.zeros(3), "b": 1, "c": np.float32(2)})
            return x

    text = Sowing().tabulate(KEY, X, mutable=True, console_kwargs=PLAIN)
    assert cells(text)[0][4:] == ["cache", "intermediates"]
    for line in ("nested:", "a: float32[3]", "b: int32[]", "c: float32[]", "5 (20 B)", "h:", "- float32[3,5]"):
        assert line in text
    assert "cache" not in Sowing().tabulate(KEY, X, mutable=["intermediates"], console_kwargs=PLAIN)


@pytest.mark.parametrize(
    ("args", "kwargs", "shown"),
    [
        ((), {}, [""]),
        ((X,), {}, ["float32[3,5]"]),
        ((X, True), {"y": {"k": X}}, ["- float32[3,5]", "- True", "- y:", "k: float32[3,5]"]),
        (({"k": X, "l": [1, "[bold]"]},), {}, ["k: float32[3,5]", "l:", "- 1", "- [bold]"]),
        ((nn.FrozenDict(a=X),), {}, ["a: float32[3,5]"]),
    ],
)
def test_inputs_are_outlined(args, kwargs, shown):
    class Anything(nn.Module):
        def __call__(self, *args, **kwargs):
            """Takes anything."""

    lines = Anything().tabulate(KEY, *args, console_kwargs=PLAIN, **kwargs).splitlines()
    rows = [line.split("│")[3].strip() for line in lines if line.startswith("│")]
    assert [cell for cell in rows if cell] == [cell for cell in shown if cell]


def test_options_reach_rich_and_the_free_function_is_the_method():
    kwargs = dict(table_kwargs={"title": "Hello"}, column_kwargs={"justify": "right"}, console_kwargs=PLAIN)
    text = nn.tabulate(nn.Dense(2), KEY, **kwargs)(X)
    assert "Hello" in text and "│  Dense │" in text
    assert text == nn.Dense(2).tabulate(KEY, X, **kwargs)


def test_the_axes_of_a_partitioned_parameter_stand_beside_its_shape():
    kernel_init = nn.with_partitioning(nn.initializers.ones, ("in", None))
    text = nn.Dense(2, kernel_init=kernel_init).tabulate(KEY, X, console_kwargs=PLAIN)
    assert "kernel: float32[5,2] P(in, None)" in text
