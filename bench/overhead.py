# SPDX-License-Identifier: Apache-2.0
"""What does a jitted train step over live objects cost, beside the same step written by hand over a flat list?

The step is the gradient of a small loss over V tiny parameters and Adam: so little arithmetic that the time is the
time of passing 3 V arrays in and out. The floor is the hand-written step: read the values out of boxes, `jax.jit` over
a flat list, write the results back. A contender that donates its arguments is compared with the floor that donates.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from batiste import linen, nnx
from batiste.training import train_state
from measure import Call, Slices, machine, print_table, timed

WIDTH = 4
ADAM = optax.adam(1e-3)
FLOORS = {True: "floor, donated", False: "floor"}


def loss_of_pairs(x: jax.Array, pairs: Iterable[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The sum over V / 2 pairs of tiny parameters of mean((x[4] * w[4] + b[4]) ** 2)."""
    return sum((jnp.mean((x * w + b) ** 2) for w, b in pairs), start=jnp.zeros(()))


def start(count: int) -> list[jax.Array]:
    """The values of `count` parameters."""
    return [jnp.full(WIDTH, 1.0 - i % 2, jnp.float32) for i in range(count)]


# The contenders: each builds its state for V parameters, and returns the call that does one step.


class Box:
    """A hand-written mutable value."""

    __slots__ = ("value",)

    def __init__(self, value: jax.Array):
        self.value = value


def by_hand(count: int, donate: bool) -> Call:
    params = start(count)
    state = ADAM.init(params)
    leaves, treedef = jax.tree.flatten((params, state))
    boxes, x = [Box(leaf) for leaf in leaves], jnp.ones(WIDTH)

    def flat_step(leaves: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        params, state = jax.tree.unflatten(treedef, leaves)
        loss, grads = jax.value_and_grad(lambda p: loss_of_pairs(x, zip(p[::2], p[1::2])))(params)
        updates, state = ADAM.update(grads, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state)), loss

    step = jax.jit(flat_step, donate_argnums=0 if donate else ())

    def call() -> jax.Array:
        values, loss = step([box.value for box in boxes], x)
        for box, value in zip(boxes, values):
            box.value = value
        return loss

    return call


def nested_dict(count: int, donate: bool) -> Call:
    values, x = start(count), jnp.ones(WIDTH)
    params = {f"cell{i}": {"w": values[2 * i], "b": values[2 * i + 1]} for i in range(count // 2)}
    now = [params, ADAM.init(params)]

    def dict_step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: loss_of_pairs(x, [(c["w"], c["b"]) for c in p.values()]))(params)
        updates, state = ADAM.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(dict_step, donate_argnums=(0, 1) if donate else ())

    def call() -> jax.Array:
        now[0], now[1], loss = step(now[0], now[1], x)
        return loss

    return call


def build_objects(nnx: ModuleType, count: int) -> tuple[Any, Any]:
    """A model of V / 2 modules with two parameters each, and its optimizer; `nnx` is batiste's or Flax's."""

    class Cell(nnx.Module):
        def __init__(self, w: jax.Array, b: jax.Array):
            self.w, self.b, self.note = nnx.Param(w), nnx.Param(b), 0

    class Net(nnx.Module):
        def __init__(self, values: list[jax.Array]):
            self.cells = nnx.List([Cell(w, b) for w, b in zip(values[::2], values[1::2])])

    model = Net(start(count))
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def object_step(nnx: ModuleType, **modes: bool) -> Callable[..., jax.Array]:
    """The step over live objects: what it changes, it changes in place."""

    def loss_of(model: Any, x: jax.Array) -> jax.Array:
        return loss_of_pairs(x, [(cell.w[...], cell.b[...]) for cell in model.cells])

    def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of, **modes)(model, x)
        optimizer.update(model, grads)
        return loss

    return step


def over_objects(count: int, donate: bool, nnx: ModuleType, **modes: bool) -> Call:
    model, optimizer = build_objects(nnx, count)
    x = jnp.ones(WIDTH)
    step = nnx.jit(object_step(nnx, **modes), donate_argnums=(0, 1) if donate else (), **modes)
    return lambda: step(model, optimizer, x)


def over_cached(count: int, donate: bool, nnx: ModuleType) -> Call:
    model, optimizer = build_objects(nnx, count)
    x = jnp.ones(WIDTH)
    jitted = nnx.jit(object_step(nnx), donate_argnums=(0, 1) if donate else ())
    step = nnx.cached_partial(jitted, model, optimizer)
    return lambda: step(x)


def over_train_state(count: int, donate: bool, linen: ModuleType, train_state: ModuleType) -> Call:
    """The step over a TrainState of the functional face; the modules are batiste's or Flax's."""

    class Cell(linen.Module):
        @linen.compact
        def __call__(self) -> tuple[jax.Array, jax.Array]:
            w = self.param("w", linen.initializers.ones, (WIDTH,))
            return w, self.param("b", linen.initializers.zeros, (WIDTH,))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return loss_of_pairs(x, [Cell()() for _ in range(count // 2)])

    def state_step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda params: state.apply_fn({"params": params}, x))(state.params)
        return state.apply_gradients(grads=grads), loss

    net, x = Net(), jnp.ones(WIDTH)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    now = [train_state.TrainState.create(apply_fn=net.apply, params=params, tx=ADAM)]
    step = jax.jit(state_step, donate_argnums=0 if donate else ())

    def call() -> jax.Array:
        now[0], loss = step(now[0], x)
        return loss

    return call


def over_equinox(count: int, donate: bool, eqx: ModuleType) -> Call:
    class Cell(eqx.Module):
        w: jax.Array
        b: jax.Array

    class Net(eqx.Module):
        cells: list[Cell]

    values, x = start(count), jnp.ones(WIDTH)
    model = Net([Cell(w, b) for w, b in zip(values[::2], values[1::2])])  # type: ignore[call-arg]
    now = [model, ADAM.init(model)]

    def tree_step(model: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(lambda m, x: loss_of_pairs(x, [(c.w, c.b) for c in m.cells]))(model, x)
        updates, state = ADAM.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, loss

    step = eqx.filter_jit(tree_step, donate="all-except-first" if donate else "none")
    if donate:  # the first argument is the one that is kept
        step = eqx.filter_jit(lambda x, model, state: tree_step(model, state, x), donate="all-except-first")

    def call() -> jax.Array:
        now[0], now[1], loss = step(x, *now) if donate else step(*now, x)
        return loss

    return call


def contenders(count: int, peers: str) -> dict[str, tuple[bool, Callable[[], Call]]]:
    """Name -> (donates, how to build it). `peers` is "none", "all", or "some": Flax only up to a hundred parameters."""
    out: dict[str, tuple[bool, Callable[[], Call]]] = {}

    def add(name: str, build: Callable[..., Call], *args: Any, donations: tuple[bool, ...] = (True, False), **kw: Any):
        for donate in donations:
            out[name + ", donated" * donate] = donate, functools.partial(build, count, donate, *args, **kw)

    add("floor", by_hand)
    add("batiste nnx.jit", over_objects, nnx)
    add("batiste linen TrainState", over_train_state, linen, train_state)
    if peers != "none":
        add("nested dict", nested_dict)
        if find_spec("equinox"):
            import equinox

            add("equinox filter_jit", over_equinox, equinox)
        if find_spec("flax") and (peers == "all" or count <= 100):
            import flax.linen
            import flax.training.train_state
            from flax import nnx as flax_nnx

            add("flax linen TrainState", over_train_state, flax.linen, flax.training.train_state)
            add("flax nnx.jit", over_objects, flax_nnx)
            add("flax nnx.jit graph_updates=False", over_objects, flax_nnx, donations=(False,), graph_updates=False)
            add("flax nnx.jit graph=False", over_objects, flax_nnx, donations=(False,), graph=False)
            add("flax nnx.cached_partial", over_cached, flax_nnx)
    return out


def compare(count: int, seconds: float, only: str, peers: str) -> list[dict[str, Any]]:
    """One row per contender: its time, and the ratios to the floor that donates as it does and to Flax's twin."""
    chosen = {
        name: (donate, build)
        for name, (donate, build) in contenders(count, peers).items()
        if name in FLOORS.values() or only in name
    }
    calls = {name: build() for name, (_, build) in chosen.items()}
    slices = Slices(calls, seconds)
    pairs = [(name, name.replace("batiste", "flax")) for name in chosen if name.startswith("batiste")]
    twins = {ours: theirs for ours, theirs in pairs if theirs in chosen}
    return [
        {
            "variables": count,
            "contender": name,
            "cpu_us": slices.median(name) * 1e6,
            "cpu_ratio": slices.ratio(name, FLOORS[donate]),
            "wall_us": slices.median(name, "wall") * 1e6,
            "wall_ratio": slices.ratio(name, FLOORS[donate], "wall"),
            "flax_ratio": slices.ratio(name, twins[name]) if name in twins else None,
            "rounds": slices.rounds,
        }
        for name, (donate, _) in chosen.items()
    ]


def after_a_change(count: int, repeats: int = 20) -> dict[str, float]:
    """What the call after a structural change costs more: a static attribute goes to and fro between two values."""
    model, optimizer = build_objects(nnx, count)
    x, step = jnp.ones(WIDTH), nnx.jit(object_step(nnx))
    cell, extra = model.cells[0], []
    for i in range(repeats + 2):
        cell.note = i % 2
        changed, _ = timed(lambda: step(model, optimizer, x), 1)
        plain, _ = timed(lambda: step(model, optimizer, x), 1)
        if i >= 2:  # the first two compile
            extra.append(changed - plain)
    modules = sum(1 for _ in nnx.iter_modules(model)) + sum(1 for _ in nnx.iter_modules(optimizer))
    ms = statistics.median(extra) * 1e3
    return {"variables": count, "modules": modules, "ms": ms, "ms_per_100_modules": ms / modules * 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="numbers of parameters")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring, per size")
    parser.add_argument("--only", default="", help="contenders whose name has this in it, and the floor")
    parser.add_argument("--peers", choices=("none", "some", "all"), default="some", help="all: Flax at every size")
    parser.add_argument("--json", action="store_true", help="one JSON line with everything at the end")
    args = parser.parse_args()
    print(machine())

    rows: list[dict[str, Any]] = []
    for count in args.sizes:
        found = compare(count, args.seconds, args.only, args.peers)
        rows += found
        print_table(
            f"{count} parameters, {3 * count} arrays in and out; median of {found[0]['rounds']} rounds",
            ["a jitted Adam step", "CPU us", "x floor", "wall us", "x floor", "CPU x Flax"],
            [
                [r["contender"], f"{r['cpu_us']:,.0f}", f"{r['cpu_ratio']:.2f}", f"{r['wall_us']:,.0f}"]
                + [f"{r['wall_ratio']:.2f}", f"{r['flax_ratio']:.2f}" if r["flax_ratio"] else ""]
                for r in found
            ],
        )
    changes = [after_a_change(count) for count in args.sizes]
    print_table(
        "the call after a structural change, above a call without one (CPU)",
        ["parameters", "modules", "ms", "ms per 100 modules"],
        [[f"{c['variables']}", f"{c['modules']}", f"{c['ms']:.2f}", f"{c['ms_per_100_modules']:.2f}"] for c in changes],
    )
    if args.json:
        print(json.dumps({"machine": machine(), "steps": rows, "changes": changes}))


if __name__ == "__main__":
    main()
