# SPDX-License-Identifier: Apache-2.0
"""A program for the command line: two clouds of points, told apart by a small network."""

from __future__ import annotations

import dataclasses
import enum
import signal
from pathlib import Path
from typing import Literal

import numpy as np
import optax

from batiste import nn, nnx
from batiste.cli import Experiment
from batiste.data import Loader
from batiste.graph import Module, Param, Rngs
from batiste.training import Hook, Optimizer, accuracy, log_loss, train_step


class Activation(enum.Enum):
    relu = "relu"
    gelu = "gelu"


@dataclasses.dataclass
class Adam:
    lr: float = dataclasses.field(default=0.05, metadata={"help": "learning rate"})
    clip: float | None = 1.0


@dataclasses.dataclass
class Config:
    sizes: tuple[int, ...] = (8,)
    steps: int = 30
    apart: float = dataclasses.field(default=4.0, metadata={"help": "distance of the clouds"})
    activation: Activation = Activation.relu
    order: Literal["shuffled", "fixed"] = "shuffled"
    drop_last: bool = False
    optimizer: Adam = dataclasses.field(default_factory=Adam)


class Net(Module):
    def __init__(self, sizes: tuple[int, ...], activation: Activation, rngs: Rngs):
        ends = (2, *sizes)
        self.layers = nnx.Sequential(*(nn.Linear(n, m, rngs=rngs) for n, m in zip(ends, sizes)))
        self.last = nn.Linear(ends[-1], 2, rngs=rngs)
        self.activation = activation.value

    def __call__(self, x):
        return self.last(getattr(nn, self.activation)(self.layers(x)))


def loss(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def points(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(64) % 2
    return (rng.normal(size=(64, 2)) + config.apart * y[:, None]).astype(np.float32), y.astype(np.int32)


def blobs(config: Config) -> Experiment:
    model = Net(config.sizes, config.activation, Rngs(0))
    optimizer = Optimizer(model, optax.adam(config.optimizer.lr), wrt=Param)
    last = "drop" if config.drop_last else "partial"
    return Experiment(
        state=(model, optimizer),
        step=train_step(loss, clip=config.optimizer.clip),
        data=Loader(points(config, 0), 16, shuffle=config.order == "shuffled", last=last),
        until=config.steps,
        held_out=Loader(points(config, 1), 24, shuffle=False),
        metrics={"accuracy": accuracy(), "loss": log_loss()},
        require={"accuracy": 0.9},
        policy="bfloat16",
    )


@dataclasses.dataclass
class Kept(Config):
    """Of a run that is kept, and perhaps stopped by a signal."""

    folder: Path = Path("run")
    stop_at: int | None = None


class Stop(Hook):
    def __init__(self, at: int | None):
        self.at = at

    def step(self, run):
        if run.step == self.at:
            signal.raise_signal(signal.SIGINT)


def kept(config: Kept) -> Experiment:
    made = blobs(config)
    made.folder, made.every, made.hooks = config.folder, 10, [Stop(config.stop_at)]
    return made


def model_alone() -> Experiment:
    return Experiment(state=Net((4,), Activation.relu, Rngs(0)))


def nothing():
    return None


def two(a: int, b: int) -> Experiment:
    return Experiment(state=(a, b))


def broken() -> Experiment:
    raise RuntimeError("the data are on another machine")
