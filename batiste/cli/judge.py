# SPDX-License-Identifier: Apache-2.0
"""What the commands on experiments share: what an experiment must have, its figures, and the verdict on them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from batiste.training import Report, evaluate

from .experiment import Experiment
from .program import program
from .settings import meant
from .usage import UsageError


def experiment(args: Namespace, *needed: str) -> Experiment:
    """The experiment of a command, which must have some parts.

    Raises:
        UsageError: no program was given, or a part is missing.
    """
    if args.program is None:
        raise UsageError("Which program?", expected=f"batiste {args.command} PROGRAM.py:NAME")
    found = program(args.program)
    made = found.experiment(args.settings)
    missing = [name for name in needed if (part := getattr(made, name)) is None or (name == "metrics" and not part)]
    if missing:
        fix = f"return Experiment({', '.join(f'{name}=…' for name in missing)}, …)"
        raise UsageError(
            f"{args.command} needs more than {found.name} gives", got=f"no {', no '.join(missing)}", fix=fix
        )
    return made


def measured(made: Experiment, model: Any) -> Report:
    """The figures of a model on the held-out data."""
    return evaluate(model, made.held_out, made.metrics, predict=made.predict, labels=made.labels, slices=made.slices)


def judged(made: Experiment, report: Report, args: Namespace) -> int:
    """Prints figures and verdict, writes them where asked, and gives the exit code."""
    required = thresholds(made, args)
    verdict = report.check(required)
    print(report)
    if required:
        print(verdict)
    if args.json:
        figures = {name: figure.value for name, figure in report.figures.items() if isinstance(figure.value, float)}
        written(args.json, {"figures": figures, "examples": report.count, "missed": sorted(verdict.missed)})
    return verdict.exit_code


def thresholds(made: Experiment, args: Namespace) -> dict[str, float]:
    """What is required of the metrics, by the experiment and by `--require metric=value`.

    Raises:
        UsageError: a threshold of something that is not measured, or that is no number.
    """
    found: dict[str, float | str] = dict(made.require)
    found.update((name, value) for name, _, value in (text.partition("=") for text in args.require))
    for name, value in found.items():
        if name not in made.metrics:
            known = ", ".join(made.metrics) or "none"
            raise UsageError(f"There is no metric {name!r}", expected=f"one of {known}", fix=meant(name, made.metrics))
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"The threshold of {name} is no number", got=repr(value)) from None
    return found  # type: ignore[return-value]


def written(path: str, content: Any) -> None:
    """Writes JSON to a file."""
    try:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--json cannot be written: {error}") from error
