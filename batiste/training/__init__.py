# SPDX-License-Identifier: Apache-2.0
"""What trains and evaluates a model: steps, loops, guards, scores; optimizers, metrics, averages.

    step = train_step(loss, clip=1.0, guard=Guard("skip"))             # loss(model, batch) -> value or (value, metrics)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    run = fit(step, (model, optimizer), batches, until=Until(epochs=10), checkpoints=Manager("run"),
              hooks=[Progress(), JsonLines("run/metrics.jsonl"), Evaluation(held_out, {"accuracy": accuracy()})])
    print(evaluate(model, held_out, {"accuracy": accuracy(), "f1": f1(10)}))

Every part can be used without the others: a step is a function, a loop takes any step, a score any model.
"""

from .accumulate import accumulated
from .clock import Clock
from .ema import EMA
from .epochs import Epochs
from .evaluation import Change, Comparison, Figure, Report, Verdict, compare, evaluate
from .guards import Guard, LossScale, NonFiniteError
from .hooks import Evaluation, Hook, Progress, StopEarly
from .loop import Checkpoints, Interrupted, OutOfMemoryError, Run, Until, fit
from .optimizer import Optimizer
from .scores import (
    Score,
    accuracy,
    auroc,
    bleu,
    calibration_error,
    confusion_matrix,
    f1,
    log_loss,
    mean_of,
    perplexity,
    rouge,
    top_k,
)
from .step import Trainable, TrainStep, global_norm, train_step
from .writers import Curves, JsonLines, TensorBoard, read_lines

__all__ = [
    "Change",
    "Checkpoints",
    "Clock",
    "Comparison",
    "Curves",
    "EMA",
    "Evaluation",
    "Epochs",
    "Figure",
    "Guard",
    "Hook",
    "Interrupted",
    "JsonLines",
    "LossScale",
    "NonFiniteError",
    "Optimizer",
    "OutOfMemoryError",
    "Progress",
    "Report",
    "Run",
    "Score",
    "StopEarly",
    "TensorBoard",
    "TrainStep",
    "Trainable",
    "Until",
    "Verdict",
    "accumulated",
    "accuracy",
    "auroc",
    "bleu",
    "calibration_error",
    "compare",
    "confusion_matrix",
    "evaluate",
    "f1",
    "fit",
    "global_norm",
    "log_loss",
    "mean_of",
    "perplexity",
    "read_lines",
    "rouge",
    "top_k",
    "train_step",
]
