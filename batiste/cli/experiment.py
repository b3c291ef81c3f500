# SPDX-License-Identifier: Apache-2.0
"""Experiment: what a program hands to the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batiste.checkpoint import Manager
    from batiste.precision import Policy
    from batiste.sharding import Plan
    from batiste.training import Hook, Score, TrainStep, Until


@dataclasses.dataclass
class Experiment:
    """A model with all that is done to it. `batiste train` needs the first four; each command says what it misses.

    Args:
        state: `(model, optimizer)`, or the state of a functional step.
        step: as for `batiste.training.fit`, such as made by `train_step`.
        data: batches to train on, as for `fit`.
        until: when to end; a number means steps.
        held_out: batches to evaluate on, `(inputs, labels)` or what `predict` and `labels` take.
        metrics: scores by name, from `batiste.training`.
        require: the least value of a metric, or the largest of one of which less is better; missed, the exit code is 1.
        predict, labels, slices: as for `batiste.training.evaluate`.
        folder: where the run lives: checkpoints and `metrics.jsonl`. A second run goes on from there.
        every: steps between two checkpoints in `folder`; the end, and an interruption, are saved too.
        checkpoints: a Manager of one's own, in place of `folder` and `every`.
        hooks: if not progress, `metrics.jsonl` and an evaluation after each epoch.
        example: the arguments of a call of the model, for `inspect`; if not, the inputs of the first batch.
        plan, policy: by which the model is placed and computed; explained by `inspect`.
        export: of the model, the arguments of `batiste.export.export` but the path, such as `{"signature": {…}}`.
    """

    state: Any = None
    step: TrainStep | Callable[..., Any] | None = None
    data: Any = None
    until: Until | int | None = None
    held_out: Any = None
    metrics: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    require: Mapping[str, float] = dataclasses.field(default_factory=dict)
    predict: Callable[[Any, Any], Any] | None = None
    labels: Callable[[Any], Any] | None = None
    slices: Mapping[str, Callable[[Any], Any]] | None = None
    folder: str | Path | None = None
    every: int = 100
    checkpoints: Manager | None = None
    hooks: Sequence[Hook] | None = None
    example: Any = None
    plan: Plan | None = None
    policy: Policy | str | None = None
    export: Callable[[Any], Mapping[str, Any]] | None = None

    @property
    def model(self) -> Any:
        """The first part of the state; of a functional run, all of it."""
        return self.state[0] if isinstance(self.state, (tuple, list)) else self.state
