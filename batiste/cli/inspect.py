# SPDX-License-Identifier: Apache-2.0
"""`batiste inspect`: tables of the model of an experiment: its parts, its values, their places, their precision."""

from __future__ import annotations

import math
import shutil
import sys
from argparse import Namespace
from typing import Any

import jax
import numpy as np

from batiste.debug.summary import tabulate
from batiste.graph import Module, Variable
from batiste.graph.text import size_text, table
from batiste.precision.explain import explain_precision
from batiste.sharding import explain_sharding
from batiste.sharding.explain import values_of
from batiste.sharding.values import contents
from batiste.training import Epochs

from .experiment import Experiment
from .judge import experiment
from .usage import OK


def run(args: Namespace) -> int:
    made = experiment(args, "state")
    parts = [values_table(made.model)]
    if isinstance(made.model, Module):
        inputs = example_of(made)
        console = {"force_terminal": sys.stdout.isatty(), "width": shutil.get_terminal_size((120, 24)).columns}
        parts.insert(0, NO_EXAMPLE if inputs is None else tabulate(made.model, *inputs, console_kwargs=console))
    if made.plan is not None:
        parts.append(str(explain_sharding(made.model, made.plan)))
    if made.policy is not None:
        parts.append(str(explain_precision(made.model, made.policy)))
    print("\n\n".join(part.rstrip() for part in parts))
    return OK


NO_EXAMPLE = "The table of calls needs the arguments of one: Experiment(example=(inputs,), …)."


def example_of(made: Experiment) -> tuple[Any, ...] | None:
    """The arguments of a call: the example, or the inputs of the first pair (inputs, labels) of the data."""
    if made.example is not None:
        return made.example if isinstance(made.example, tuple) else (made.example,)
    for source in (made.data, made.held_out):
        for batch in [] if source is None else Epochs(source).first(1):
            if isinstance(batch, tuple):
                return batch[:1]
    return None


def values_table(model: Any) -> str:
    """Every value of a model: kind, shape and dtype, size, and how it is divided."""
    rows, total = [], 0
    for path, x in values_of(model):
        value, _ = contents(x)
        if not hasattr(value, "dtype"):
            continue
        size = math.prod(np.shape(value)) * value.dtype.itemsize
        total += size
        spec = getattr(getattr(value, "sharding", None), "spec", None)
        kind = type(x).__name__ if isinstance(x, Variable) else ""
        place = "whole" if spec is None or not any(spec) else str(spec)
        rows.append(("/".join(map(str, path)), kind, f"{value.dtype}{list(np.shape(value))}", size_text(size), place))
    count = jax.device_count()
    devices = f"{count} {jax.default_backend()} device{'s' if count > 1 else ''}"
    return table(
        [
            ("value", "kind", "shape", "bytes", "place"),
            *rows,
            (f"{len(rows)} values", "", "", size_text(total), devices),
        ]
    )
