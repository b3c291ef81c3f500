# SPDX-License-Identifier: Apache-2.0
"""Learns to write digits: a diffusion model of 8x8 pictures, by flow matching, guided by the digit that is asked for.

    python examples/diffusion.py                          # two minutes on two idle cores
    python examples/diffusion.py --model unet
    python examples/diffusion.py --run run/ --steps 3000  # stop it and start it again: it goes on where it was

It draws a row of pictures per digit into samples.png, and says how good they are, beside the figures of real digits:

    named     how often a classifier that learnt from real digits names the digit that was asked for
    distance  of all pictures together from held-out real ones, in the classifier's features (Fréchet): 0 is the same
              mean and spread
    nearest   of each picture from the nearest one the model learnt from, in pixels: far less than for real digits means
              that it learnt them by heart

It ends with 0; with 1 if fewer are named than --require; with 2 and a reason if arguments do not fit; stopped by a
signal, with 128 and the number of the signal, and the run is saved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from batiste import nnx
from batiste.checkpoint import CheckpointError, Manager, MismatchError
from batiste.models.diffusion import dropped, euler, flow_loss, flow_times, guided, heun
from batiste.models.dit import Dit, DitConfig
from batiste.models.unet import Unet, UnetConfig
from batiste.training import EMA, JsonLines, Progress, Until, fit, train_step
from digits_data import Dataset, fail, load
from digits_data import batches as moved

DIGITS = 10
NONE = DIGITS  # the label that stands for none
SIZES = {
    "dit": DitConfig(8, 2, 3, 3, 32, channels=1, outputs=1, classes=DIGITS, drop_class=0.0),
    "unet": UnetConfig(8, (32, 64), (1,), 1, channels=1, outputs=1, groups=8, labels=DIGITS + 1),
}
TINY = {
    "dit": DitConfig(8, 4, 1, 2, 8, channels=1, outputs=1, classes=DIGITS, drop_class=0.0),
    "unet": UnetConfig(8, (8,), (0,), 1, channels=1, outputs=1, groups=4, labels=DIGITS + 1),
}
SAMPLERS = {"euler": euler, "heun": heun}


# ---------------------------------------------------------------- training
def model_of(kind: str, tiny: bool, seed: int) -> Any:
    config: Any = (TINY if tiny else SIZES)[kind]
    return (Dit if kind == "dit" else Unet)(config, rngs=nnx.Rngs(seed))


def loss(model: Any, batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Of the velocity from pictures to noise; a tenth of the pictures come without their label."""
    pictures, labels, seed = batch
    key, label_key = jax.random.split(jax.random.key(seed))
    labels = dropped(labels, label_key, none=NONE)
    return flow_loss(lambda x, t: model(x, t, labels), pictures, key)


def batches(data: Dataset, size: int, seed: int, epoch: int) -> Iterator[tuple[Any, ...]]:
    """One epoch: pictures from -1 to 1 in a new order, and a number from which the noise is drawn; all follow from the
    epoch, so a run that goes on gets the same.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(data.train_y))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield 2 * data.train_x[chosen] - 1, data.train_y[chosen], rng.integers(1 << 31, dtype=np.uint32)


def trained(data: Dataset, args: argparse.Namespace) -> Any:
    """The average of the models of the last steps."""
    model = model_of(args.model, args.tiny, args.seed)
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, args.steps // 20, args.steps)
    optimizer = nnx.Optimizer(model, optax.adamw(rate, weight_decay=1e-2), wrt=nnx.Param)
    ema = EMA(model, 0.99, only=nnx.Param)
    feed = lambda epoch: batches(data, args.batch, args.seed, epoch)
    fit(train_step(loss, clip=1.0, ema=ema), (model, optimizer), feed, Until(steps=args.steps),
        [Progress(), *([JsonLines(args.run / "metrics.jsonl")] if args.run else [])], every=50,
        checkpoints=Manager(args.run, every=200) if args.run else None)  # fmt: skip
    averaged = ema.apply_to(model)
    averaged.eval()
    return averaged


# ---------------------------------------------------------------- sampling
def written(model: Any, labels: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """A picture from 0 to 1 of each digit that is asked for; all of them come from one loop on the device."""

    @nnx.jit
    def write(model: Any, noise: jax.Array, labels: jax.Array) -> jax.Array:
        predict = guided(model, labels, none=NONE, scale=args.scale)
        return SAMPLERS[args.sampler](predict, noise, flow_times(args.sampling_steps))

    noise = jax.random.normal(jax.random.key(args.seed + 1), (len(labels), 8, 8, 1))
    return np.clip((np.asarray(write(model, noise, jnp.asarray(labels))) + 1) / 2, 0, 1)


def draw(pictures: np.ndarray, path: Path) -> None:
    """A row for each digit, of its first ten pictures."""
    rows = pictures.reshape(DIGITS, -1, 8, 8)[:, :10]
    gap = np.pad(rows, ((0, 0), (0, 0), (1, 0), (1, 0)))  # a dark line between pictures
    sheet = gap.transpose(0, 2, 1, 3).reshape(DIGITS * 9, -1)
    figure = Figure(figsize=(6, 6 * sheet.shape[0] / sheet.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1)
    axes.axis("off")
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- how good are they?
class Judge(nnx.Module):
    """logits[B, 10] = out(features), features[B, 64] = relu(hidden(two convolutions))"""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 32, (3, 3), 2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.out = nnx.Linear(64, DIGITS, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return nnx.relu(self.hidden(x.reshape(*x.shape[:-3], -1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.features(x))


def judge_of(data: Dataset, epochs: int) -> Judge:
    """A classifier that learnt from real digits, moved by up to a pixel."""
    judge = Judge(nnx.Rngs(0))
    optimizer = nnx.Optimizer(judge, optax.adam(2e-3), wrt=nnx.Param)
    named = lambda judge, batch: optax.softmax_cross_entropy_with_integer_labels(judge(batch[0]), batch[1]).mean()
    step = train_step(named, guard=None)
    for epoch in range(epochs):
        for batch in moved(data.train_x, data.train_y, 64, np.random.default_rng(epoch)):
            step(judge, optimizer, batch)
    return judge


class Figures(NamedTuple):
    """Of some pictures: the share whose digit is named, the distance of all, the middle of each one's (see above)."""

    named: float
    distance: float
    nearest: float


def figures(judge: Judge, data: Dataset, x: np.ndarray, labels: np.ndarray) -> Figures:
    features, logits = (np.asarray(f(jnp.asarray(x))) for f in (judge.features, judge))
    held_out = np.asarray(judge.features(jnp.asarray(data.test_x)))
    flat, known = x.reshape(len(x), -1), data.train_x.reshape(len(data.train_x), -1)
    squares = (flat**2).sum(1)[:, None] + (known**2).sum(1) - 2 * flat @ known.T
    return Figures(float((logits.argmax(1) == labels).mean()), frechet(features, held_out),
                   float(np.median(np.sqrt(np.maximum(squares, 0).min(1)))))  # fmt: skip


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """|mean(a) - mean(b)|² + trace(A + B - 2 √(√A B √A)),  A and B the covariances

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x.astype(np.float64).T)) for x in (a_ND, b_ND))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return abs(float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * product))


def real_like(data: Dataset, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Real pictures of these digits that were learnt from: what the best model could do."""
    return np.stack([data.train_x[rng.choice(np.flatnonzero(data.train_y == label))] for label in labels])


# ---------------------------------------------------------------- the run
def main(argv: list[str] | None = None) -> int:
    args, began = options(argv), time.perf_counter()
    data = load("digits")
    if args.batch > len(data.train_y):
        fail(f"got --batch {args.batch}, expected at most the {len(data.train_y):,} pictures to learn from")
    for name, folder in (("--out", args.out), ("--run", args.run)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot write to {name} {folder}: {error.strerror}")
    try:
        model = trained(data, args)
    except MismatchError:
        fail(f"the run in {args.run} is of another model\n  fix: name a new folder, or the --model it was begun with")
    except CheckpointError as error:
        fail(f"cannot keep the run in {args.run}: {error}")
    learnt = time.perf_counter() - began

    labels = np.arange(DIGITS).repeat(args.each)
    began = time.perf_counter()
    pictures = written(model, labels, args)
    print(f"trained in {learnt:.0f} s; {len(labels)} pictures in {time.perf_counter() - began:.1f} s")
    draw(pictures, args.out / "samples.png")

    judge = judge_of(data, 1 if args.tiny else 20)
    found = {
        "written": figures(judge, data, pictures, labels),
        "real, held out": figures(judge, data, data.test_x, data.test_y),
        "real, learnt from": figures(judge, data, real_like(data, labels, np.random.default_rng(0)), labels),
    }
    print(f"{'digits':<18} {'named':>7} {'distance':>9} {'nearest':>8}")
    for name, row in found.items():
        print(f"{name:<18} {row.named:>7.1%} {row.distance:>9.3f} {row.nearest:>8.3f}")
    print(f"drawn: {args.out / 'samples.png'}")
    if found["written"].named < args.require:
        print(f"named is below the required {args.require:.1%}")
        return 1
    return 0


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZES), default="dit", help="what learns (default: dit)")
    parser.add_argument("--tiny", action="store_true", help="a model of next to no size, to try the program")
    parser.add_argument("--steps", type=positive, help="of training (dit: 2000, unet: 1000)")
    parser.add_argument("--batch", type=positive, default=64, help="pictures per step (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the noise (default: 0)")
    parser.add_argument("--scale", type=float, default=1.5, help="how closely labels are followed; 1: not guided (1.5)")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default="heun", help="(default: heun)")
    parser.add_argument("--sampling-steps", type=positive, default=20, help="from noise to picture (default: 20)")
    parser.add_argument("--each", type=positive, default=36, help="pictures of each digit (default: 36)")
    parser.add_argument("--out", type=Path, default=Path("diffusion-output"), help="folder of the picture")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="keep the run here, and go on from it if stopped")
    parser.add_argument("--require", type=float, default=0.0, help="end with 1 if fewer are named, such as 0.9")
    args = parser.parse_args(argv)
    args.steps = args.steps or {"dit": 2000, "unet": 1000}[args.model]
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above zero")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
