# SPDX-License-Identifier: Apache-2.0
"""How objects of the library are shown as text, and by treescope where that is installed.

An object says *what* it shows in one method, `__batiste_repr__() -> Layout`; its `__repr__` calls `represent(self)` and
its `__treescope_repr__` calls `treescope_form(self, path, subtree_renderer)`. This file decides how that looks:

    Linear( # Param: 9 (36 B)          a node, with the sizes of the Variables below it, by kind
      kernel=Param( # 6 (24 B)         a Variable, with its own size
        value=Array(shape=(2, 3), dtype=dtype('float32'))
      ),
      in_features=2
    )

An object that was shown before is `Linear(...)`. Below a node, arrays of several elements are shown by shape.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.tree_util import default_registry

from .config import config
from .jaxcompat import Tracer, is_ref
from .optional import need


@dataclass(frozen=True, slots=True)
class Layout:
    """What an object shows of itself.

    Args:
        name: the name of its class; empty for a nested mapping that has none.
        items: the pairs (key, value); a Variable's first item is its value.
        brackets: what stands around the items.
        join: what stands between a key and its value. With `"="` the key is a name, with `": "` it is shown by its
            repr, and with an empty `join` it is not shown.
        kind: for a Variable, the word under which its size is counted.
        counted: the sizes of the Variables below are shown, and their arrays by shape.
    """

    name: str
    items: Iterable[tuple[Any, Any]]
    brackets: tuple[str, str] = ("(", ")")
    join: str = "="
    kind: str | None = None
    counted: bool = False


class Nested:
    """A plain mapping that is shown a line per item, as the levels of a State are."""

    def __init__(self, mapping: Mapping):
        self.mapping = mapping

    def __batiste_repr__(self) -> Layout:
        return Layout(
            "",
            [(k, Nested(v) if isinstance(v, dict) else v) for k, v in self.mapping.items()],
            brackets=("{", "}"),
            join=": ",
        )

    def __repr__(self) -> str:
        return represent(self)


@dataclass(slots=True)
class Drawing:
    """One call of `repr` by the user, and all the calls it leads to."""

    seen: dict[int, Any] = field(default_factory=dict)  # holds the objects, so that no id is used twice
    depth: int = 0
    by_shape: bool = False


DEEPEST = 64  # levels that are drawn, if no other limit is set: Python can go down in some more
_drawing: contextvars.ContextVar[Drawing | None] = contextvars.ContextVar("drawing", default=None)


def represent(obj: Any) -> str:
    """The text of an object that has `__batiste_repr__`; called inside another one's text, it goes on with that one."""
    drawing = _drawing.get()
    if drawing is not None:
        return _text_of_object(obj, drawing)
    token = _drawing.set(Drawing())
    try:
        return represent(obj)
    finally:
        _drawing.reset(token)


def _text_of_object(obj: Any, drawing: Drawing) -> str:
    layout = obj.__batiste_repr__()
    before, after = layout.name + layout.brackets[0], layout.brackets[1]
    items = list(layout.items)
    if not items:
        return before + after
    if _too_deep(drawing) or id(obj) in drawing.seen:
        return f"{before}...{after}"
    if layout.kind is None:
        drawing.seen[id(obj)] = obj
    outside = drawing.by_shape
    drawing.by_shape, drawing.depth = outside or layout.counted, drawing.depth + 1
    lines = [_key(key, layout.join) + _text(value, drawing) for key, value in items]
    drawing.by_shape, drawing.depth = outside, drawing.depth - 1
    comment = _comment(obj, layout, items)
    body = ",\n".join(lines).replace("\n", "\n  ")
    return f"{before}{f' # {comment}' if comment else ''}\n  {body}\n{after}"


def _key(key: Any, join: str) -> str:
    if not join:
        return ""
    return f"{key}=" if join == "=" else f"{key!r}{join}"


def _too_deep(drawing: Drawing) -> bool:
    limit = config.flax_max_repr_depth
    return drawing.depth >= (DEEPEST if limit is None else limit)


def _text(value: Any, drawing: Drawing) -> str:
    """Any value as text: containers with the objects in them, classes by name, arrays perhaps by shape."""
    kind = type(value)
    if kind is list:
        return f"[{', '.join(_text(v, drawing) for v in value)}]"
    if kind is dict:
        return f"{{{', '.join(f'{k!r}: {_text(v, drawing)}' for k, v in value.items())}}}"
    if kind is tuple:
        inner = ", ".join(_text(v, drawing) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        pairs = zip(kind._fields, value)
        return f"{kind.__name__}({', '.join(f'{k}={_text(v, drawing)}' for k, v in pairs)})"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (np.ndarray, jax.Array)) or is_ref(value):
        return _text_of_array(value, drawing)
    return repr(value)


def _text_of_array(array: Any, drawing: Drawing) -> str:
    deleted = isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_deleted()
    if not deleted and not (drawing.by_shape and (is_ref(array) or array.size > 1)):
        return repr(array)
    name = "ArrayRef" if is_ref(array) else "Array"
    return f"{name}(...)" if _too_deep(drawing) else f"{name}(shape={array.shape}, dtype={array.dtype!r})"


# ---------------------------------------------------------------- sizes


@dataclass(slots=True)
class Size:
    """A number of elements and of bytes."""

    elements: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, value: Any) -> Size:
        """The size of all arrays, real or abstract, in a pytree; a shape that is not known yet counts nothing."""
        total = cls()
        for leaf in jax.tree.leaves(value):
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
                elements = math.prod(leaf.shape)
                if isinstance(elements, int):
                    total += cls(elements, elements * leaf.dtype.itemsize)
        return total

    def __add__(self, other: Size) -> Size:
        return Size(self.elements + other.elements, self.bytes + other.bytes)

    def __bool__(self) -> bool:
        return self.elements > 0

    def __str__(self) -> str:
        return f"{self.elements:,} ({bytes_text(self.bytes)})"


def bytes_text(count: int) -> str:
    """A number of bytes with a unit.

    >>> bytes_text(36), bytes_text(1024), bytes_text(1_200_012)
    ('36 B', '1.0 KB', '1.2 MB')
    """
    for power, unit in ((3, "GB"), (2, "MB"), (1, "KB")):
        if count >= 1024**power:
            return f"{count / 1000**power:,.1f} {unit}"
    return f"{count:,} B"


def sizes_by_kind(obj: Any) -> dict[str, Size]:
    """The sizes of all Variables below an object, each counted once."""
    sizes: dict[str, Size] = {}
    for kind, value in _variables(obj):
        sizes[kind] = sizes.get(kind, Size()) + Size.of(value)
    return {kind: size for kind, size in sizes.items() if size}


def _variables(root: Any) -> Iterator[tuple[str, Any]]:
    seen: dict[int, Any] = {}
    todo = [root]
    while todo:
        obj = todo.pop()
        if id(obj) in seen:
            continue
        seen[id(obj)] = obj
        if hasattr(type(obj), "__batiste_repr__"):
            layout = obj.__batiste_repr__()
            items = list(layout.items)
            if layout.kind is not None:
                yield layout.kind, items[0][1]
                continue
            children = [value for _, value in sorted(items, key=lambda item: str(item[0]))]
        else:
            level = default_registry.flatten_one_level(obj)
            children = list(level[0]) if level is not None else []
        todo += reversed(children)


def _comment(obj: Any, layout: Layout, items: list[tuple[Any, Any]]) -> str:
    if layout.kind is not None:
        size = Size.of(items[0][1])
        return str(size) if size else ""
    if not layout.counted:
        return ""
    sizes = sizes_by_kind(obj)
    if len(sizes) > 1:
        sizes["Total"] = sum(sizes.values(), Size())
    return ", ".join(f"{kind}: {size}" for kind, size in sizes.items())


# ---------------------------------------------------------------- treescope


def treescope_form(obj: Any, path: str | None, subtree_renderer: Any) -> Any:
    """What `__treescope_repr__` returns for an object that has `__batiste_repr__`."""
    layout = obj.__batiste_repr__()
    items = [(key, value.mapping if isinstance(value, Nested) else value) for key, value in layout.items]
    if layout.join == ": ":
        draw = need("treescope.repr_lib", extra="display").render_dictionary_wrapper
        return draw(type(obj), dict(items), path, subtree_renderer)
    parts = need("treescope.rendering_parts", extra="display")
    color = need("treescope.formatting_util", extra="display").color_from_string(type(obj).__qualname__)
    place = "{}.{}" if layout.join else "{}[{}]"
    children = [
        parts.siblings_with_annotations(
            _key(key, layout.join),
            subtree_renderer(value, path=None if path is None else place.format(path, key)),
        )
        for key, value in items
    ]
    before, after = layout.brackets
    comment = _comment(obj, layout, items)
    return parts.build_foldable_tree_node_from_children(
        prefix=parts.siblings(parts.maybe_qualified_type_name(type(obj)), before),
        children=children,
        suffix=after,
        comma_separated=True,
        path=path,
        background_color=color,
        first_line_annotation=parts.comment_color(parts.text(f" # {comment}")) if comment else None,
    )
