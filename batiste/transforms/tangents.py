# SPDX-License-Identifier: Apache-2.0
"""Gradients, tangents and cotangents of live objects: how they look, and how they are read back into flat values.

With live objects (Flax's default mode) what belongs to a module is a `State` of those of its Variables that have a
gradient. Without, it is an object of the same type. Plain arrays and lone Variables look like themselves in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import jax
import numpy as np

from batiste.graph.boundary import PLAIN, SENT, Mode, Note, Rules, Walked, is_root
from batiste.graph.errors import AutodiffError
from batiste.graph.flatten import Walk
from batiste.graph.pytree import Pytree
from batiste.graph.split import flat_pairs
from batiste.graph.states import State, from_flat_state
from batiste.graph.structure import ARRAY_REF, LEAF, VARIABLE, Path, show_path, walk_defs
from batiste.graph.unflatten import Build
from batiste.graph.variable import Variable


class Role(Enum):
    """The label of a leaf under differentiation."""

    DIFF = "differentiated"
    REST = "not differentiated"

    def __str__(self) -> str:
        return self.value


DIFF, REST = Role


class DiffState(Rules):
    """An argument of which only the Variables that `filter` matches are differentiated.

    >>> DiffState(0, ...)
    DiffState(argnum=0, filter=Ellipsis)
    """

    def __init__(self, argnum: int, filter: Any):
        super().__init__([(filter, DIFF), (..., REST)])
        self.argnum, self.filter = argnum, filter

    def __eq__(self, other):
        return super().__eq__(other) and self.argnum == other.argnum

    def __hash__(self):
        return hash((super().__hash__(), self.argnum))

    def __repr__(self):
        return f"DiffState(argnum={self.argnum!r}, filter={self.filter!r})"


def specs_of(args: Sequence[Any], chosen: dict[int, Any]) -> list[Any]:
    """How each leaf and root object of `args` is labelled; `chosen` says it per argument, the others take no part.

    A filter speaks of the Variables inside objects: arrays and Variables that stand alone are differentiated whole.
    """
    specs: list[Any] = []
    for n, arg in enumerate(args):
        spec = chosen.get(n, REST)
        leaves = jax.tree.leaves(arg, is_leaf=is_root)
        specs += [DIFF if isinstance(spec, Rules) and not isinstance(x, Pytree) else spec for x in leaves]
    return specs


# ---------------------------------------------------------------- structure <-> flat values
class _Shown(Build):
    """Builds objects around gradients; a Variable without one is None."""

    def variable(self, d: Any, new: Any) -> Any:
        made = None if new is None else d.type._new(new, dict(d.metadata.items), d.metadata, self.trace)
        self.objects[d.index] = made
        return made


def _places(d: Any) -> Iterator[tuple[Path, Any]]:
    """The pairs (path, description) of the leaves of one entry of a tree of arguments."""
    if d is PLAIN:
        yield (), d
        return
    for path, part in walk_defs(d):
        if part[0] in (LEAF, VARIABLE, ARRAY_REF):
            yield path, part


class Likeness(NamedTuple):
    """The structure that gradients share with what they are gradients of.

    Args:
        walked: that structure.
        mode: whether objects are shown as States.
    """

    walked: Walked
    mode: Mode

    def size(self) -> int:
        """The number of leaves."""
        return sum(1 for d in self.walked.defs for _ in _places(d))

    # ------------------------------------------------------------ values -> tree
    def show(self, values: Iterable[Any]) -> Any:
        """The tree around these values, one per leaf; None where there is none."""
        build = _Shown(values, None, False)
        leaves = []
        for d in self.walked.defs:
            if d is PLAIN:
                leaves.append(next(build.leaves))
            elif self.mode.live and d[0] != VARIABLE:
                pairs = [(path, build.value(part)) for path, part in _places(d)]
                leaves.append(from_flat_state({path: x for path, x in pairs if x is not None}))
            else:
                leaves.append(build.value(d))
        return jax.tree.unflatten(self.walked.treedef, leaves)

    # ------------------------------------------------------------ tree -> values
    def read(self, tree: Any, what: str, wanted: Callable[[int], bool] | None = None) -> list[Any]:
        """The values of a tree like this one, one per leaf; None where it has none.

        Args:
            what: names the tree in errors.
            wanted: must the Variable at this position have a value (True), or must it have none (False)?

        Raises:
            AutodiffError: the tree has another structure.
        """
        try:
            parts = self.walked.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise AutodiffError(
                f"{what}: unexpected tree structure",
                got=str(jax.tree.structure(tree, is_leaf=is_root)),
                expected=f"the same tree structure as {self.walked.treedef} ({error})",
            ) from None
        walk = Walk(self.mode.graph, what=self.mode.name)
        values: list[Any] = []
        for d, part in zip(self.walked.defs, parts):
            found = _values(walk, d, part, what)
            for path, place in _places(d):
                value = found.pop(path, None)
                if wanted and part is not None and place[0] == VARIABLE and (value is not None) != wanted(len(values)):
                    verb = "has no value" if value is None else "has a value for something that is not differentiated"
                    raise AutodiffError(
                        f"{what} {verb}", at=show_path(path), fix="return one value for each differentiated Variable"
                    )
                values.append(value)
            if found:
                raise AutodiffError(
                    f"{what} has values that nothing asked for",
                    got=", ".join(map(show_path, found)),
                    expected="the same tree structure as what is differentiated",
                )
        return values


def _values(walk: Walk, d: Any, x: Any, what: str) -> dict[Path, Any]:
    """What `x` holds for one entry, by path."""
    if x is None:
        return {}
    if isinstance(x, State):
        return {path: _handed_in(v) for path, v in flat_pairs(x)}
    if d is PLAIN or (d[0] == VARIABLE and not is_root(x)):
        return {(): x}
    if not is_root(x):
        raise AutodiffError(
            f"{what} does not look like its argument: Expected State or Variable, got {type(x).__name__}",
            fix="give a State, or an object of the same type, for each module",
        )
    start = len(walk.leaves)
    walk.value(x, ())
    return dict(zip(walk.paths[start:], map(_handed_in, walk.leaves[start:])))


def _handed_in(x: Any) -> Any:
    """The value of a Variable, which has arrived where it was to go: nothing that was written to it is lost."""
    if not isinstance(x, Variable):
        return x
    if x._home is not None:
        x._home.delivered()
    return x.get_raw_value()


class Output(NamedTuple):
    """What a function returned: its likeness, and which of its leaves travelled (the others are inputs, returned)."""

    likeness: Likeness
    sent: list[bool]

    @classmethod
    def of(cls, note: Note, mode: Mode, has_aux: bool = False) -> Output:
        """The first half of the result, if the second is auxiliary data."""
        walked = note.out
        count = Likeness(walked, mode).size()
        sent = [source is SENT for source in note.sources[len(note.sources) - count :]]
        if has_aux:
            treedef = walked.treedef.children()[0]
            walked = Walked(treedef, walked.defs[: treedef.num_leaves])
        likeness = Likeness(walked, mode)
        return cls(likeness, sent[: likeness.size()])

    def show(self, values: Iterable[Any]) -> Any:
        """The tree around the values of the leaves that travelled."""
        came = iter(values)
        return self.likeness.show([next(came) if sent else None for sent in self.sent])

    def read(self, tree: Any, what: str) -> list[Any]:
        """The values of the leaves that travelled."""
        return [x for x, sent in zip(self.likeness.read(tree, what), self.sent) if sent]


def zero_tangent(x: Any) -> Any:
    """The zero of the tangent space of `x`, of dtype `float0` where `x` does not vary continuously."""
    dtype = jax.dtypes.result_type(x)
    if jax.numpy.issubdtype(dtype, jax.numpy.inexact):
        return jax.numpy.zeros(np.shape(x), dtype)
    return np.zeros(np.shape(x), jax.dtypes.float0)
