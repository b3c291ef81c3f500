# SPDX-License-Identifier: Apache-2.0
"""(Structure, leaves) -> live objects: new ones, or the very same ones, rebuilt in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from .epoch import structure_changed
from .errors import too_deep
from .jaxcompat import current_trace, is_ref
from .metadata import frozen_metadata
from .pytree import Pytree, prepare, same_place
from .states import State
from .structure import (
    LEAF,
    OBJECT,
    REF,
    SHARED,
    STATIC,
    TREE,
    VARIABLE,
    ObjectDef,
    TreeDef,
    VariableDef,
)
from .variable import Variable


class Unchanged:
    def __repr__(self):
        return "UNCHANGED"


UNCHANGED = Unchanged()
"""A leaf's new value that says: keep the one that is there."""
jax.tree_util.register_pytree_node(Unchanged, lambda _: ((), None), lambda *_: UNCHANGED)


def unflatten_graph(root: Any, leaves: Iterable[Any], *, reuse: Mapping[int, Any] | None = None, copy: bool = False,
                    recreate: bool = True):  # fmt: skip
    """Returns `(object, objects by number)`: objects whose number is in `reuse` are rebuilt in place, others are made.

    A leaf that is a Variable becomes part of the new object as it is, unless `copy` is set; a plain value gets a
    Variable around it where one stood, unless `recreate` is False.
    """
    build = Build(leaves, reuse, copy, recreate)
    try:
        return build.value(root), build.objects
    except RecursionError:
        raise too_deep(root) from None


class Build:
    """One reconstruction in progress."""

    def __init__(self, leaves: Iterable[Any], reuse: Mapping[int, Any] | None, copy: bool, recreate: bool = True):
        self.leaves, self.reuse, self.copy, self.recreate = iter(leaves), reuse, copy, recreate
        self.objects: dict[int, Any] = {}
        self.trace = current_trace()

    def value(self, d: Any) -> Any:
        tag = d[0]
        if tag == VARIABLE:
            return self.variable(d, next(self.leaves))
        if tag == OBJECT:
            return self.object(d)
        if tag == LEAF:
            x = next(self.leaves)
            return x.get_raw_value() if isinstance(x, Variable) else x
        if tag == TREE:
            return build_tree(d, [self.value(c) for c in d.children])
        if tag == STATIC:
            return d.setting.values[0]
        if tag == REF:
            return self.met(d.index)
        if tag == SHARED:
            return self.variable(d, self.met(d.ref))
        old = self.reuse.get(d.index) if self.reuse else None
        x = next(self.leaves)
        if isinstance(x, jax.Array) and not is_ref(x):  # a new Ref came out of a transform by its value
            x = jax.new_ref(x)
        self.objects[d.index] = x = old if x is UNCHANGED else x
        return x

    def met(self, index: int) -> Any:
        return self.objects[index] if index in self.objects else self.reuse[index]  # type: ignore[index]

    def variable(self, d: VariableDef, new: Any) -> Variable:
        old = self.reuse.get(d.index) if self.reuse else None
        if old is not None:
            if new is not UNCHANGED:
                old.set_raw_value(new)
            if d.metadata is not old._frozen and d.metadata != frozen_metadata(old):
                old._set_metadata(dict(d.metadata.items))
            new = old
        elif isinstance(new, Variable):
            new = new.copy() if self.copy else new
        elif self.recreate:
            metadata = dict(d.metadata.items)
            if metadata["ref"] and isinstance(new, jax.Array) and not is_ref(new):
                new = jax.new_ref(new)
            new = d.type._new(new, metadata, d.metadata, self.trace)._in_its_form()
        self.objects[d.index] = new
        if d.ref is not None:
            self.objects[d.ref] = new._raw_value if isinstance(new, Variable) else new
        return new

    def object(self, d: ObjectDef) -> Pytree:
        x = self.reuse.get(d.index) if self.reuse else None
        made = x is None
        if made:
            x = object.__new__(d.type)
            prepare(x, dict(d.names), self.trace)
            object.__setattr__(x, "_planned", True)
        self.objects[d.index] = x
        int_keys = d.type._pytree__has_int_keys
        attributes = dict(zip(d.settings.names, d.settings.values))
        old = {} if made else x.__dict__
        for key, child in zip(d.keys, d.children):
            name = str(key) if int_keys else key
            value = self.value(child)
            attributes[name] = old.get(name) if value is UNCHANGED else value
        if made:
            x.__dict__.update(attributes)
        else:
            if not _same_structure(old, attributes) or x._pytree__nodes != dict(d.names):
                object.__setattr__(x, "_pytree__nodes", dict(d.names))
                structure_changed()
            old.clear()
            old.update(attributes)
        return x


def _same_structure(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the same objects stand under the same names; one array may have taken another's place."""
    return len(old) == len(new) and all(
        name in old and (old[name] is value or same_place(old[name], value)) for name, value in new.items()
    )


def build_tree(d: TreeDef, children: list[Any]) -> Any:
    """One plain pytree node around its children."""
    form = d.form
    if form is dict:
        return dict(zip(d.keys, children))
    if form is State:
        return State(dict(zip(d.keys, children)), _copy=False)
    if form is list or form is tuple:
        return form(children)
    if isinstance(form, type):
        return form(*children)
    return jax.tree.unflatten(form, children)
