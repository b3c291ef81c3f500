# SPDX-License-Identifier: Apache-2.0
"""Stack: n equal layers one after another, whose program and memory are chosen from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batiste.graph import List, Module, merge, split
from batiste.graph.boundary import Mode, is_root
from batiste.graph.errors import ArgumentError, ShapeError
from batiste.graph.restream import split_rngs
from batiste.graph.rng import Rngs
from batiste.sharding import PARTITION_NAME, constrain_batch
from batiste.transforms.axes import Carry, StateAxes
from batiste.transforms.batching import vmap
from batiste.transforms.compile import jit
from batiste.transforms.depth import Remat, Run, drive_of
from batiste.transforms.loops import looped

AROUND = StateAxes({...: Carry})  # what the layers share and write goes from one to the next


class Stack(Module):
    """x → f(θ[n-1], … f(θ[1], f(θ[0], x))), where the layers f(θ[i], ·) differ in their Variables alone

    The Variables of all layers stand in one module, `layers`, stacked along a new first axis: a kernel (in, out) of n
    layers is (n, in, out). Their random streams differ. How the stack is gone through changes neither these, nor a
    checkpoint, nor the result, and may be changed at any time:

        model.set_attributes(Stack, run="unroll", remat="dots")

    Args:
        make: makes one layer, `make(rngs)`; called, the layer takes x and gives x of the same shape and dtype.
        n: the number of layers.
        rngs: streams for the parameters and for what is random in the layers.
        run: `scan`, one copy of the layer in the program: compiled fast; `unroll`, one copy per layer, traced once:
            XLA sees all of them together.
        remat: what the backward pass computes again instead of keeping it: None (nothing), `full`, `dots`,
            `names:a,b`, `offload`, `offload:a,b`, a policy of JAX, or `sqrt` (groups of √n layers); see
            `batiste.transforms.remat.policy_of`.
        has_aux: the layers return `(x, more)`; the stack then returns `(x, more)` with each `more` stacked.
        axis: the logical name of the new axis, in the metadata of Variables that name their axes.

    >>> from batiste import nnx
    >>> layers = nnx.Stack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 4, rngs=nnx.Rngs(0))
    >>> layers.layers.kernel.shape, layers(jnp.ones((2, 3))).shape, len(layers)
    ((4, 3, 3), (2, 3), 4)

    Raises:
        ArgumentError: `n` is below one, or `run` or `remat` are unknown.
    """

    def __init__(self, make: Callable[[Rngs], Module], n: int, *, rngs: Rngs, run: Run = "scan", remat: Remat = None,
                 has_aux: bool = False, axis: str = "layers"):  # fmt: skip
        if n < 1:
            raise ArgumentError("a stack has at least one layer", got=f"n={n}", fix="pass n=1 or more")
        drive_of(run, remat)
        metadata = {PARTITION_NAME: axis}
        with split_rngs(rngs, splits=n):  # type: ignore[union-attr]
            self.layers = vmap(make, transform_metadata=metadata)(rngs)
        self.n, self.run, self.remat, self.has_aux, self.axis = n, run, remat, has_aux, axis

    @classmethod
    def of(cls, layers: Sequence[Module], *, run: Run = "scan", remat: Remat = None, has_aux: bool = False,
           axis: str = "layers") -> Stack:  # fmt: skip
        """A stack with copies of these layers, which have the same structure.

        Raises:
            ArgumentError: there is none, or they differ in structure.
        """
        parts = [split(layer) for layer in layers]
        if len({graphdef for graphdef, _ in parts}) != 1:
            raise ArgumentError("the layers of a stack have the same structure", got=f"{len(parts)} layers that differ",
                                fix="make them with the same arguments")  # fmt: skip
        stacked = merge(parts[0][0], jax.tree.map(lambda *xs: jnp.stack(xs), *(state for _, state in parts)))
        stack = cls(lambda rngs: Module(), len(parts), rngs=Rngs(0), run=run, remat=remat, has_aux=has_aux, axis=axis)
        stack.layers = stacked
        return stack

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        """A copy of layer `i`."""
        if not -self.n <= i < self.n:
            raise IndexError(f"Layer {i} of a stack of {self.n}: pass -{self.n} to {self.n - 1}.")
        graphdef, state = split(self.layers)
        return merge(graphdef, jax.tree.map(lambda x: x[i], state))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.n))

    def unstacked(self) -> List:
        """Copies of all layers."""
        return List(list(self))

    def apart(self) -> Apart:
        """Copies of all layers, to be gone through as this is."""
        return Apart(list(self), has_aux=self.has_aux)

    def __call__(self, x: Any, *args: Any, each: Any = None, **kwargs: Any) -> Any:
        """Goes through the layers: `x = layer(x, *args, **kwargs)`.

        Args:
            x: an array, or a tree of arrays.
            *args, **kwargs: are handed to every layer alike; what is no array or object in them is part of the program.
            each: a tree of arrays with a first axis of n; layer i gets entry i, as the keyword argument `each`.

        Raises:
            ShapeError: the first axis of `each` is not n.
            CarryError: a layer returns another shape or dtype than it got.
        """
        for leaf in jax.tree.leaves(each):
            if jnp.shape(leaf)[:1] != (self.n,):
                raise ShapeError("`each` has an entry for every layer", at=self, got=jnp.shape(leaf),
                                 expected=f"({self.n}, ...)", fix="stack the entries along the first axis")  # fmt: skip
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_root)
        passed = tuple(isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or is_root(leaf) for leaf in leaves)
        fixed = tuple(leaf for leaf, is_passed in zip(leaves, passed) if not is_passed)
        moving = [leaf for leaf, is_passed in zip(leaves, passed) if is_passed]
        roots = tuple(is_root(leaf) for leaf in moving)
        through = _through(self.run, self.remat, self.has_aux, each is not None, structure, passed, fixed, roots,
                           self.axis)  # fmt: skip
        return through(self.layers, x, each, *moving)


class Apart(Module):
    """x → f(θ[n-1], … f(θ[1], f(θ[0], x))), as a Stack, where each layer has Variables of its own

    A program that goes through stacked layers copies the Variables of each out of the stack. That is nothing beside a
    batch of training; beside one token it is as much as all the rest. Apart, each layer is read where it lies; the
    program is longer, and is traced once all the same.

    Args:
        layers: have the same structure.
        has_aux: the layers return `(x, more)`; the result is then `(x, (more of each, …))`.

    >>> from batiste import nnx
    >>> stack = nnx.Stack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 4, rngs=nnx.Rngs(0))
    >>> layers = stack.apart()
    >>> layers.layers[2].kernel.shape, bool(jnp.array_equal(layers(jnp.ones(3)), stack(jnp.ones(3))))
    ((3, 3), True)
    """

    def __init__(self, layers: Sequence[Module], *, has_aux: bool = False):
        self.layers, self.has_aux = List(list(layers)), has_aux

    def __len__(self) -> int:
        return len(self.layers)

    def apart(self) -> Apart:
        return self

    def __call__(self, x: Any, *args: Any, each: Sequence[Any] | None = None) -> Any:
        """Goes through the layers: `x = layer(x, *args)`; layer i gets `each[i]`, as the keyword argument `each`."""
        more = []
        for i, layer in enumerate(self.layers):
            x = _called(layer, x, args, {} if each is None else {"each": each[i]})
            if self.has_aux:
                x, aux = x
                more.append(aux)
        return (x, tuple(more)) if self.has_aux else x


@jit
def _called(layer: Any, x: Any, args: tuple, own: dict[str, Any]) -> Any:
    """One layer, as a program of its own: layers of one structure are traced once."""
    return layer(constrain_batch(x), *args, **own)


@functools.lru_cache(maxsize=1024)
def _through(run: Run, remat: Remat, has_aux: bool, has_each: bool, structure: Any, passed: tuple[bool, ...],
             fixed: tuple[Any, ...], roots: tuple[bool, ...], axis: str) -> Callable[..., Any]:  # fmt: skip
    """The loop of these settings: kept, so that its programs are found again."""

    def layer(block, x, each, *moving):
        found, settings = iter(moving), iter(fixed)
        args, kwargs = jax.tree.unflatten(structure, [next(found if is_passed else settings) for is_passed in passed])
        x = constrain_batch(x)  # or, in a loop, the features would be divided as the parameters of a plan are
        return block(x, *args, **kwargs, **({"each": each} if has_each else {}))

    in_axes = (0, Carry, 0, *(AROUND if is_object else None for is_object in roots))
    out_axes = (Carry, 0) if has_aux else Carry
    return looped(layer, Mode(True, True, "Stack"), in_axes, out_axes, {PARTITION_NAME: axis}, drive_of(run, remat))
