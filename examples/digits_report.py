# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: its options, a progress bar, a table, two pictures, and where to go next."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from digits_data import Dataset, fail

console = Console()

NEXT = (
    ("make demo DATA=fashion-mnist", "the same network on 70,000 pictures of clothes"),
    (
        ".venv/bin/python examples/digits_linen.py",
        "the same network and checkpoint in the functional face",
    ),
    (".venv/bin/python examples/digits_functional.py", "the same program as plain jax.jit over split and merge"),
    ("make bench", "what a jitted step over live objects costs, beside other libraries"),
    ("make demo ARGS='--epochs 5 --seed 1'", "other options; --help lists them. The network is examples/digits.py"),
    ("make test", "every test, and every example in the documentation"),
)


def options(description: str) -> argparse.Namespace:
    """The command line of the programs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="what to train on")
    parser.add_argument("--epochs", type=positive, help="passes over the data (digits: 30, fashion-mnist: 2)")
    parser.add_argument("--batch", type=positive, default=64, help="images per step (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the shifts (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of the pictures")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trained variables to this checkpoint")
    parser.add_argument("--load", type=Path, metavar="FILE", help="start from this checkpoint")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="keep the run here, and go on from it if stopped")
    parser.add_argument("--require", type=float, default=0.0, help="fail below this held-out accuracy, such as 0.98")
    return parser.parse_args()


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above zero")
    return int(text)


class Report:
    """The figures of a run as they come in: one row of `history` per epoch."""

    def __init__(self, data: Dataset, args: argparse.Namespace):
        self.data, self.batch, self.out, self.require = data, args.batch, args.out, args.require
        self.epochs = args.epochs or data.epochs
        self.per_epoch = len(data.train_y) // args.batch  # steps; a short last batch is left out
        if self.per_epoch == 0:
            fail(f"got --batch {args.batch}, expected at most the {len(data.train_y):,} images to learn from")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot write to --out {self.out}: {error.strerror}")
        self.history: list[dict[str, float]] = []
        self.steps = 0
        self.started = self.epoch_began = time.perf_counter()
        console.print(
            f"[bold]{data.name}[/]: {len(data.train_y):,} images of {data.size}x{data.size} to learn from, "
            f"{len(data.test_y):,} held out; {self.epochs} epochs in steps of {self.batch}",
            soft_wrap=True,
        )

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A bar with loss, accuracy and images per second; without a terminal, a line per epoch."""
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as self.bar:
            self.task = self.bar.add_task("training", total=self.epochs * self.per_epoch, now="")
            yield self

    def step(self) -> bool:
        """Counts a step; true when it is time to show figures again, since reading them waits for the device."""
        self.steps += 1
        self.bar.advance(self.task)
        return self.steps % 10 == 0

    def show(self, loss: float, accuracy: float) -> str:
        """Puts the figures of this epoch so far beside the bar."""
        images = ((self.steps - 1) % self.per_epoch + 1) * self.batch
        speed = images / (time.perf_counter() - self.epoch_began)
        now = f"loss {loss:.3f}  accuracy {accuracy:6.1%}  {speed:,.0f} images/s"
        self.bar.update(self.task, now=now)
        return now

    def epoch(self, loss: float, accuracy: float, test_loss: float, predicted: np.ndarray) -> None:
        """Takes the figures of a whole epoch; without a terminal, prints them."""
        now = self.show(loss, accuracy)
        test_accuracy = float((predicted == self.data.test_y).mean())
        self.history.append(dict(loss=loss, accuracy=accuracy, test_loss=test_loss, test_accuracy=test_accuracy))
        if not console.is_terminal:
            console.print(
                f"epoch {len(self.history):3}/{self.epochs}  held out {test_accuracy:6.1%}  {now}", soft_wrap=True
            )
        self.epoch_began = time.perf_counter()

    def finish(self, predicted: np.ndarray, parameters: int, *notes: str) -> int:
        """Prints the table and the notes, writes the pictures, says what to try next; the program's exit status."""
        seconds = time.perf_counter() - self.started
        counts = np.zeros((len(self.data.classes),) * 2, int)
        np.add.at(counts, (self.data.test_y, predicted), 1)
        accuracy = counts.trace() / counts.sum()
        console.print(table(self.data, counts))
        console.print(f"[bold]held-out accuracy {accuracy:.2%}[/], {parameters:,} parameters, {seconds:.1f} s in all")
        for note in notes:
            console.print(note, soft_wrap=True)
        console.print(f"wrote {draw_curves(self)} and {draw_confusion(self.data, counts, self.out)}", soft_wrap=True)
        if accuracy < self.require:
            console.print(f"[bold red]below the required {self.require:.2%}[/]: try more --epochs or another --seed")
            return 1
        console.print("\nNext:")
        done = (f"DATA={self.data.name}", f"/{Path(sys.argv[0]).name}")
        untried = [step for step in NEXT if not step[0].endswith(done)]
        for number, (command, what) in enumerate(untried[:3], 1):
            console.print(f"  {number}. [bold]{command}[/]\n     {what}", highlight=False, soft_wrap=True)
        return 0


def table(data: Dataset, counts: np.ndarray) -> Table:
    """Accuracy per class, and what the class was taken for when it was missed."""
    out = Table("class", title="held-out images", title_justify="left")
    for heading in ("images", "right", "accuracy"):
        out.add_column(heading, justify="right")
    out.add_column("mistaken for")
    for i, name in enumerate(data.classes):
        wrong = [(n, data.classes[j]) for j, n in enumerate(counts[i]) if n and j != i]
        mistaken = ", ".join(f"{other} ({n})" for n, other in sorted(wrong, reverse=True)[:3])
        total = counts[i].sum()
        out.add_row(name, f"{total}", f"{counts[i, i]}", f"{counts[i, i] / max(total, 1):.1%}", mistaken)
    return out


def draw_curves(report: Report) -> Path:
    """Loss and accuracy by epoch, on the images learned from and on those held out."""
    epochs = np.arange(1, len(report.history) + 1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy")):
        for key, label, colour in ((name, "learned from", "#8da0cb"), (f"test_{name}", "held out", "#d95f02")):
            values = [row[key] for row in report.history]
            axis.plot(epochs, values, label=label, color=colour, marker="o", markersize=3)
        axis.set(title=name, xlabel="epoch", xlim=(0, len(epochs) + 1))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes[1].legend(loc="lower right", frameon=False)
    figure.suptitle(f"{report.data.name}: learning curves")
    path = report.out / "curves.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_confusion(data: Dataset, counts: np.ndarray, out: Path) -> Path:
    """How many images of each class (rows) were taken for each class (columns)."""
    figure, axis = plt.subplots(figsize=(6.4, 5.8), layout="constrained")
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    right = np.eye(len(counts), dtype=bool)
    shade = np.sqrt(share)  # the root makes a single mistake visible
    for cells, colours in ((right, "Blues"), (~right & (counts > 0), "Oranges")):
        axis.imshow(np.ma.masked_where(~cells, 0.1 + 0.8 * shade), cmap=colours, vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts):
        if n:
            ink = "white" if shade[i, j] > 0.6 else "black"
            axis.text(j, i, str(n), ha="center", va="center", fontsize=9, color=ink)
    axis.set_xticks(np.arange(-0.5, len(counts)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(counts)), minor=True)
    axis.grid(which="minor", color="#e4e4e4", linewidth=1)
    axis.tick_params(which="both", length=0)
    ticks = range(len(data.classes))
    long = max(map(len, data.classes)) > 2
    axis.set_xticks(ticks, data.classes, rotation=40 if long else 0, ha="right" if long else "center")
    axis.set_yticks(ticks, data.classes)
    axis.set(xlabel="predicted", ylabel="true", title=f"{data.name}: {counts.trace()} of {counts.sum()} right")
    axis.spines[:].set_visible(False)
    path = out / "confusion.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
