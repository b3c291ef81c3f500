# SPDX-License-Identifier: Apache-2.0
"""The errors of the library: what happened, where in the model, got and expected, and the one fix.

BatisteError
├── ArgumentError, RngError, AliasError, StructureError                 (also ValueError)
├── ShapeError, DtypeError                                              (also ValueError and TypeError)
├── FilterError, StaticError, CallError                                 (also TypeError)
├── CarryError, BranchError                                             (StructureErrors, also TypeError)
├── AutodiffError, MissingRuleError                                     (ArgumentErrors, also TypeError)
├── TraceContextError, CapturedError                                    (the latter also ValueError)
└── ImmutableVariableError

BatisteWarning                                                          (also UserWarning)
├── LostUpdateWarning, StaleCaptureWarning, UntiedWarning
└── StateMismatchWarning
"""

from __future__ import annotations

import sys
from typing import Any

from .callers import user_place

_locators: list[Any] = []  # filled by `walk`: finds a module's path in the model that is running


class BatisteError(Exception):
    """Base of every error that the library raises on its own account.

    A traceback ends with a note of the user's line and of the transforms around it; the text, which may go to
    strangers, names no file.

    Args:
        problem: one sentence that says what happened.
        at: a module (its path in the running model is looked up now) or a path as text.
        got, expected: what was there, and what should have been.
        fix: the one thing to do.

    >>> str(ShapeError("Linear got a wrong last dim", at="decoder/mlp", got=(8, 512), expected="(..., 768)"))
    'Linear got a wrong last dim at decoder/mlp: got (8, 512), expected (..., 768).'
    """

    def __init__(self, problem: str, *, at: Any = None, got: Any = None, expected: Any = None, fix: str | None = None):
        self.problem, self.got, self.expected, self.fix = problem, got, expected, fix
        self.path = locate(at)
        super().__init__(self._text())
        if place := user_place():
            self.add_note(f"  In: {place}")

    def _text(self) -> str:
        text = self.problem
        if self.path:
            text += f" at {self.path}"
        details = [
            f"{word} {value}" for word, value in (("got", self.got), ("expected", self.expected)) if value is not None
        ]
        if details:
            text += ": " + ", ".join(details)
        if not text.endswith((".", "\n")):
            text += "."
        return f"{text.rstrip()}\n  Fix: {self.fix}" if self.fix else text

    def __reduce__(self):
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls, args, state):
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ShapeError(BatisteError, ValueError, TypeError):
    """An array has another shape than the layer or the variable needs.

    Also a TypeError, which is what JAX raises when the operands of an operation do not fit.
    """


class DtypeError(BatisteError, TypeError, ValueError):
    """An array has a dtype that the operation cannot take."""


class ArgumentError(BatisteError, ValueError):
    """An argument has a value outside what is documented."""


class RngError(BatisteError, ValueError):
    """A random stream is missing or malformed."""


class FilterError(BatisteError, TypeError):
    """Something stands where a filter is wanted and is none."""


class AliasError(BatisteError, ValueError):
    """One object was met twice where it may be met once, or under two different labels."""


class StructureError(BatisteError, ValueError):
    """Two structures that should fit do not."""


class CarryError(StructureError, TypeError):
    """What goes round in a loop came back with other objects, another structure or other types than it went in with."""


class BranchError(StructureError, TypeError):
    """Two branches of which one is taken leave different structures or types behind."""


class AutodiffError(ArgumentError, TypeError):
    """What is differentiated, and what it is differentiated by, do not fit."""


class MissingRuleError(AutodiffError, AttributeError):
    """A `custom_vjp` function was called before `defvjp`."""


class CallError(BatisteError, TypeError):
    """A function was called with arguments that it cannot take, or not in this way."""


class StaticError(BatisteError, TypeError):
    """A static attribute cannot be compared and hashed."""


class TraceContextError(BatisteError):
    """An object was written from another trace level than the one it was made in.

    The write would leak a tracer or be lost: pass the object to the transformed function as an argument.
    """


class CapturedError(TraceContextError, ValueError):
    """A transformed function hands out an object that it did not receive and did not make."""


class ImmutableVariableError(BatisteError):
    """A Variable that may only be read was written."""


def too_deep(x: Any) -> StructureError:
    """The error of an object that holds more levels of objects in each other than Python can go down."""
    return StructureError(
        f"the {type(x).__name__} is nested too deep",
        expected=f"fewer levels than fit on a stack of {sys.getrecursionlimit()} calls",
        fix="put layers that follow each other into a list; or call sys.setrecursionlimit first",
    )


class BatisteWarning(UserWarning):
    """Base of the warnings about programs that run, and most likely do something else than was meant."""


class StateMismatchWarning(BatisteWarning):
    """A state was written into a model that has other shapes, other kinds of values or other parts."""


class StaleCaptureWarning(BatisteWarning):
    """A compiled function reads a Variable that it was not given and that has changed: it is compiled again."""


class UntiedWarning(BatisteWarning):
    """A function of JAX took a model apart as a tree, and one Variable at two places became two."""


def locate(at: Any) -> str:
    """The path of `at` in the model that is running, for an error message; text is returned as it is.

    The stack is searched from the outermost call inwards for a module from which `at` can be reached.
    """
    if at is None or isinstance(at, str):
        return at or ""
    roots, frame = [], sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        roots.append([owner, *frame.f_locals.values()] if owner is not None else list(frame.f_locals.values()))
        frame = frame.f_back
    for candidates in reversed(roots):
        for find in _locators:
            path = find(candidates, at)
            if path is not None:
                return path
    return ""  # it is the root, or nobody holds it
