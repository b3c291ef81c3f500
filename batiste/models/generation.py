# SPDX-License-Identifier: Apache-2.0
"""Generation: tokens one after another, each drawn from what the model says of those before it.

A program reads the prompts, another takes a step. Prompts are padded to a size of a plan of sizes, and so is the cache:
inside a plan, no new length compiles anything. Rows are padded behind their end; what lies there is never seen.

Dims:  B rows   T positions of the prompts   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batiste.graph.errors import ArgumentError, RngError, ShapeError
from batiste.transforms.compile import jit

from .decoder import Cache, Decoder
from .sampling import GREEDY, Sampling, drawn, penalised

SIZES = tuple(1 << i for i in range(4, 21))
"""The sizes to which prompts and caches are padded: powers of two from 16."""
PIECE = 128
"""How many tokens of a prompt a model with a window reads at a time: its cache holds so many more than the window."""


class Rows(NamedTuple):
    """What goes from step to step: the cache, the last tokens, how often each occurred, and the number of the draw."""

    cache: Cache
    token_B: Array
    prompted_BV: Array
    generated_BV: Array
    draw: Array


def generate(model: Decoder, prompt_BT: Array, steps: int, *, temperature: float = 0.0, top_k: int | None = None,
             sampling: Sampling | None = None, lengths: Sequence[int] | None = None, padded: str = "right",
             ends: Iterable[int] = (), key: Array | None = None, sizes: Sequence[int] = SIZES) -> Array:  # fmt: skip
    """tokens[B, T + steps]: the prompts, and what follows

    Args:
        temperature, top_k: of `sampling`, for short.
        sampling: how tokens are drawn; the likeliest are taken, if left out.
        lengths: of each row's prompt, if some are padded; what follows then stands behind all of them, from T on.
        padded: where they are: `right` or `left`.
        ends: tokens that end a row; what is behind the first is that token again.
        key: what the draws are made from.
        sizes: to which prompts and cache are padded.

    Raises:
        ArgumentError: `steps` is below one, or a setting is out of range.
        RngError: there is a temperature and no key.

    >>> from batiste.graph import Rngs
    >>> from batiste.models import DECODERS
    >>> generate(Decoder(DECODERS["tiny"], rngs=Rngs(0)), jnp.zeros((1, 3), int), 4).shape
    (1, 7)
    """
    if top_k is not None and not 1 <= top_k <= model.config.vocab:
        raise ArgumentError("top_k is a number of tokens", got=top_k, expected=f"from 1 to {model.config.vocab}")
    if padded not in ("left", "right"):
        raise ArgumentError("rows are padded on one side", got=padded, expected="left or right")
    if prompt_BT.ndim != 2 or not prompt_BT.shape[1]:
        raise ShapeError("a prompt is a row of tokens", got=prompt_BT.shape, expected="(batch, length ≥ 1)")
    sampling = sampling or Sampling(temperature, top_k or 0)
    batch, length = prompt_BT.shape
    rows = np.asarray(prompt_BT)
    lengths = [length] * batch if lengths is None else [int(n) for n in lengths]
    if len(lengths) != batch or not all(1 <= n <= length for n in lengths):
        raise ArgumentError("each row has a length", got=lengths, expected=f"{batch} numbers from 1 to {length}")
    prompts = [row[:n] if padded == "right" else row[length - n :] for row, n in zip(rows, lengths)]
    new = list(stream(model, prompts, steps, sampling, ends=ends, key=key, sizes=sizes))
    last = [new[-1]] * (steps - len(new))
    return jnp.concatenate([prompt_BT, jnp.stack([*new, *last], axis=1).astype(prompt_BT.dtype)], axis=1)


def stream(model: Decoder, prompts: Sequence[Any], steps: int, sampling: Sampling = GREEDY, *,
           ends: Iterable[int] = (), key: Array | None = None,
           sizes: Sequence[int] = SIZES) -> Iterator[np.ndarray]:  # fmt: skip
    """token[B] of one step after another, until all rows ended: prompts are rows of tokens, of any lengths

    Raises:
        ArgumentError: `steps` is below one, a prompt is empty, or none of the sizes suffices.
        RngError: there is a temperature and no key.

    >>> from batiste.graph import Rngs
    >>> from batiste.models import DECODERS
    >>> len(list(stream(Decoder(DECODERS["tiny"], rngs=Rngs(0)), [[1, 2, 3], [4]], 5)))
    5
    """
    if steps < 1:
        raise ArgumentError("steps, temperature and top_k say how tokens are drawn", got=f"steps={steps}",
                            expected="steps ≥ 1")  # fmt: skip
    if key is None and np.any(np.asarray(sampling.temperature) > 0):
        raise RngError("drawing tokens needs a key", fix="pass key=jax.random.key(0), or temperature=0")
    key = jax.random.key(0) if key is None else key
    settings, ends_E = sampling.rows(len(prompts)), np.array(sorted(set(ends)), np.int32)
    rows = begun(model, prompts, steps, sizes)
    ended_B = np.zeros(len(prompts), bool)
    token_B = np.zeros(len(prompts), np.int32)
    for _ in range(steps):
        rows = _step(model, rows, settings, key)
        token_B = np.where(ended_B, token_B, np.asarray(rows.token_B))
        yield token_B
        ended_B = ended_B | np.isin(token_B, ends_E)
        if ended_B.all():
            return


def begun(model: Decoder, prompts: Sequence[Any], steps: int, sizes: Sequence[int] = SIZES) -> Rows:
    """The prompts, read but for the last token of each, and room for `steps` more."""
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not prompts or any(prompt.ndim != 1 or not len(prompt) for prompt in prompts):
        raise ArgumentError("a prompt is a row of tokens", got=[prompt.shape for prompt in prompts],
                            expected="one token or more in each")  # fmt: skip
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    width = size_of(int(lengths_B.max()), sizes)
    places = max(width, size_of(int(lengths_B.max()) + steps, sizes))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts):
        row[: len(prompt)] = prompt
    window, piece = model.config.ring, width
    if window is not None and window + PIECE < places:
        places, piece = window + PIECE, min(width, PIECE)
    rows = _opened(model, tokens_BT, lengths_B, places)
    for start in range(0, int(lengths_B.max()), piece):
        part_BP = tokens_BT[:, start : start + piece]
        if part_BP.shape[1] < piece:
            part_BP = np.pad(part_BP, ((0, 0), (0, piece - part_BP.shape[1])))
        rows = _read(model, rows, part_BP, np.int32(start), lengths_B - 1)
    return rows


def size_of(n: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that holds n

    >>> size_of(17, (16, 32, 64))
    32
    """
    found = [size for size in sizes if size >= n]
    if not found:
        raise ArgumentError("no size of the plan suffices", got=f"{n} tokens", expected=f"at most {max(sizes)}",
                            fix="pass sizes= with a larger one")  # fmt: skip
    return min(found)


@jit(static_argnames="places")
def _opened(model: Decoder, tokens_BT: Array, lengths_B: Array, places: int) -> Rows:
    batch, length = tokens_BT.shape
    each_B = jnp.arange(batch)
    is_real_BT = jnp.arange(length)[None] < lengths_B[:, None]
    none_BV = jnp.zeros((batch, model.config.vocab), jnp.int32)
    prompted_BV = none_BV.at[jnp.broadcast_to(each_B[:, None], tokens_BT.shape), tokens_BT].add(is_real_BT) > 0
    return Rows(model.cache(batch, places, per_row=True), tokens_BT[each_B, lengths_B - 1], prompted_BV, none_BV,
                jnp.int32(0))  # fmt: skip


@jit(donate_argnames="rows")
def _read(model: Decoder, rows: Rows, part_BP: Array, start: Array, lengths_B: Array) -> Rows:
    """A piece of the prompts is read into the cache; of each row no more than its own tokens count.

    A row that is shorter reads padding over and over at its end, which stays unseen.
    """
    at_B = jnp.minimum(start, lengths_B)
    cache = rows.cache._replace(filled=at_B)
    _, cache = model.hidden(part_BP, cache)
    return rows._replace(cache=cache._replace(filled=jnp.minimum(cache.filled, lengths_B)))


@jit(donate_argnames="rows")
def _step(model: Decoder, rows: Rows, sampling: Sampling, key: Array) -> Rows:
    """The token after the last of each row."""
    x_B1D, cache = model.hidden(rows.token_B[:, None], rows.cache)
    logits_BV = penalised(model.logits(x_B1D)[:, 0], sampling, rows.prompted_BV, rows.generated_BV)
    token_B = drawn(logits_BV, sampling, jax.random.fold_in(key, rows.draw))
    generated_BV = rows.generated_BV.at[jnp.arange(len(token_B)), token_B].add(1)
    return Rows(cache, token_B, rows.prompted_BV, generated_BV, rows.draw + 1)
