# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles of weight files as data: a machine of some thirty instructions that calls nothing they name.

A pickle is a program. Python runs it, and it may import and call anything. Here an instruction makes a string, a
number, a list, a dict or a tuple; a global is a mark, looked up in the reader's own table, and what is not there is an
error that names it. There is no switch that lets it through.

Source: the standard library's pickletools, which describes each instruction; it takes them apart here too.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

from .tensors import WeightsError

MOST_INSTRUCTIONS = 1 << 19
LARGEST_NUMBER = 1 << 128
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "UNICODE", "INT", "LONG", "FLOAT",
}  # fmt: skip
# what instructions raise that are damaged; also where warnings are errors, of texts with escapes
DAMAGES = (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, DeprecationWarning)
NOTHING = {"PROTO", "FRAME"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(NamedTuple):
    """A name that the pickle mentions, and what the reader makes of a call of it."""

    name: str
    call: Callable[..., Any]


class Record(dict):
    """The attributes of an object of a class that is not looked at."""


class Machine:
    """Follows the instructions of one pickle.

    Args:
        at: what errors call the file.
        known: "module name" -> what a call of it makes; a name that ends in `*` stands for all that begin so.
        persistent: what a reference to something outside makes.

    Raises:
        WeightsError: by `run`; the pickle is damaged, names something else, or asks for what no weights need.
    """

    def __init__(self, at: str, known: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]):
        self.at, self.known, self.persistent = at, known, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """The value of the pickle that begins here; the file stands behind it afterwards."""
        try:
            for i, (opcode, value, _) in enumerate(pickletools.genops(file)):
                if i >= MOST_INSTRUCTIONS:
                    raise self.error("a pickle of weights is not that long", f"more than {i} instructions")
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, value)
        except WeightsError:
            raise
        except DAMAGES as error:
            raise self.error("the pickle is damaged", f"{type(error).__name__}: {str(error)[:80]}") from None
        raise self.error("the pickle has no end", "no STOP")

    def step(self, name: str, value: Any) -> None:
        if name in LITERALS:
            if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
                raise self.error("a number is larger than any that weights have", f"{value.bit_length()} bits")
            self.stack.append(value)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in TUPLES:
            self.stack.append(tuple(self.last(TUPLES[name])))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.stack.append(self.found(value if name == "GLOBAL" else " ".join(self.last(2))))
        elif name not in NOTHING:
            action = getattr(self, f"do_{name.lower()}", None)
            if action is None:
                raise self.error("the pickle has an instruction that weights do not need", name)
            action() if value is None else action(value)

    def found(self, name: str) -> Global:
        call = self.known.get(name)
        if call is None:
            starts = (call for start, call in self.known.items() if start.endswith("*") and name.startswith(start[:-1]))
            call = next(starts, None)
        if call is None:
            raise self.error("the file wants code that is no part of weights", repr(name.replace(" ", ".")[:200]),
                             fix="do not load it with anything that would; ask for safetensors")  # fmt: skip
        return Global(name, call)

    # ------------------------------------------------------------ the stack
    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise ValueError("a mark is no value")
        return value

    def last(self, n: int) -> list[Any]:
        return [self.pop() for _ in range(n)][::-1]

    def since_mark(self) -> list[Any]:
        found = []
        while (value := self.stack.pop()) is not MARK:
            found.append(value)
        return found[::-1]

    def do_mark(self) -> None:
        self.stack.append(MARK)

    def do_pop(self) -> None:
        self.stack.pop()

    def do_pop_mark(self) -> None:
        self.since_mark()

    def do_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binput(self, i: int) -> None:
        self.memo[i] = self.stack[-1]

    def do_binget(self, i: int) -> None:
        self.stack.append(self.memo[i])

    do_put = do_long_binput = do_binput
    do_get = do_long_binget = do_binget

    # ------------------------------------------------------------ containers
    def do_empty_list(self) -> None:
        self.stack.append([])

    def do_list(self) -> None:
        self.stack.append(self.since_mark())

    def do_tuple(self) -> None:
        self.stack.append(tuple(self.since_mark()))

    def do_empty_dict(self) -> None:
        self.stack.append({})

    def do_dict(self) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.fill(items)

    def do_append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def do_appends(self) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def do_setitem(self) -> None:
        self.fill(self.last(2))

    def do_setitems(self) -> None:
        self.fill(self.since_mark())

    def fill(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise TypeError(f"a key of type {type(key).__name__}")
            target[key] = value

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {type(self.stack[-1]).__name__} is no {kind.__name__}")
        return self.stack[-1]

    # ------------------------------------------------------------ objects
    def do_reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise TypeError("what is called is no global, or its arguments are no tuple")
        self.stack.append(function.call(*args))

    do_newobj = do_reduce

    def do_build(self) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], Record):
            if not isinstance(state, dict):
                raise TypeError("attributes are a dict")
            self.stack[-1].update(state)
        elif not isinstance(self.stack[-1], dict):  # an OrderedDict's attributes are dropped
            raise TypeError(f"a {type(self.stack[-1]).__name__} has no attributes")

    def do_binpersid(self) -> None:
        self.stack.append(self.persistent(self.pop()))

    def error(self, problem: str, got: str, fix: str = "fetch the file again") -> WeightsError:
        return WeightsError(problem, at=self.at, got=got, fix=fix)
