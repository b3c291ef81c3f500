# SPDX-License-Identifier: Apache-2.0
"""Slots: rows of one batch that come and go on their own, and the few programs that move them on.

insert   a prompt takes a slot: its settings are written, its cache is emptied
fill     a piece of the prompt is read into the slot's cache; a program for each size of piece, the last is padded
step     one token more for every slot that is live, each at its own position with its own settings

All of a prompt but its last token is filled in; the first step reads that one. So there is one program that draws, and
it alone has a head. The programs are compiled when the slots are made: nothing can compile later.

What a slot computes depends on its own contents only, and the shapes are fixed: an answer is the same, bit for bit,
alone and in any company.

Dims:  R rows (slots)   V vocabulary   P positions of a piece
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from batiste.graph import merge, split
from batiste.graph.errors import ArgumentError

from .sampling import Drawn, Draws, Sampling, drawn

PIECES = (16, 32, 64, 128)


class Rows(NamedTuple):
    """What the device remembers of all slots."""

    cache: Any
    token_R: Array
    drawn_R: Array
    prompted_RV: Array
    generated_RV: Array
    bias_RV: Array
    draws: Draws


class Slots:
    """`count` slots of `length` positions each, over one model.

    Args:
        model: a `batiste.models.Decoder`, or what has its `hidden(tokens, cache)`, `logits(x)`, `cache(batch, length)`
            and `config.vocab`; its cache is a NamedTuple with a field `filled`.
        count: slots, all of which take part in every step.
        length: positions of a slot, for prompt and answer.
        pieces: the sizes in which prompts are read. A long prompt is read in pieces of the largest.

    Raises:
        ArgumentError: a number is below one, or the largest piece does not divide `length`.
    """

    def __init__(self, model: Any, *, count: int = 8, length: int = 512, pieces: Sequence[int] = PIECES):
        pieces = tuple(sorted(set(pieces)))
        if not pieces or min(count, length, *pieces) < 1 or length % pieces[-1]:
            raise ArgumentError(
                "slots are read in whole pieces", got=f"count={count}, length={length}, pieces={pieces}",
                expected="numbers of at least 1, where the largest piece divides the length",
            )  # fmt: skip
        self.count, self.length, self.pieces, self.vocab = count, length, pieces, int(model.config.vocab)
        graphdef, self._weights = split(model)
        cache = jax.eval_shape(lambda: model.cache(1, length))
        self._empty = cache
        axes = jax.tree.map(lambda x: min(x.ndim, 1), cache)  # the layers come first; a count has no dims

        def step(weights, rows: Rows, live_R) -> tuple[Rows, Drawn]:
            decoder = merge(graphdef, weights)

            def one(token, cache):
                x_11D, cache = decoder.hidden(token[None, None], cache)
                return x_11D[0], cache

            x_R1D, cache = jax.vmap(one, in_axes=(0, axes), out_axes=(0, axes))(rows.token_R, rows.cache)
            out = drawn(decoder.logits(x_R1D)[:, 0], rows.draws, rows.drawn_R, live_R, rows.prompted_RV,
                        rows.generated_RV, rows.bias_RV)  # fmt: skip
            one_R = live_R.astype(jnp.int32)
            return rows._replace(
                cache=cache._replace(filled=rows.cache.filled + one_R),
                token_R=jnp.where(live_R, out.token, rows.token_R),
                drawn_R=rows.drawn_R + one_R,
                generated_RV=rows.generated_RV.at[jnp.arange(count), out.token].add(one_R),
            ), out

        def fill(weights, rows: Rows, slot, tokens_P, read) -> Rows:
            own = jax.tree.map(
                lambda x, axis: lax.dynamic_index_in_dim(x, slot, axis, keepdims=False), rows.cache, axes
            )
            _, new = merge(graphdef, weights).hidden(tokens_P[None], own)
            return rows._replace(cache=_with(rows.cache, slot, new._replace(filled=own.filled + read), axes))

        def insert(rows: Rows, slot, token, draws: Draws, prompted_V, bias_V) -> Rows:
            empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
            row = (token, jnp.int32(0), prompted_V, jnp.zeros(self.vocab, jnp.int32), bias_V, draws)
            others = (_with(old, slot, new, jax.tree.map(lambda _: 0, old)) for old, new in zip(rows[1:], row))
            return Rows(_with(rows.cache, slot, empty, axes), *others)

        self._axes = axes
        self._rows = self._cleared()
        i32, row = np.int32(0), Sampling().row()
        flags_V, bias_V = np.zeros(self.vocab, bool), np.zeros(self.vocab, np.float32)
        lower = lambda f, donated, *args: jax.jit(f, donate_argnums=donated).lower(*args).compile()
        self._insert = lower(insert, 0, self._rows, i32, i32, row, flags_V, bias_V)
        self._fill = {
            size: lower(fill, 1, self._weights, self._rows, i32, np.zeros(size, np.int32), i32) for size in pieces
        }
        self._step = lower(step, 1, self._weights, self._rows, np.zeros(count, bool))

    @property
    def programs(self) -> int:
        """How many programs there are."""
        return len(self._fill) + 2

    def insert(self, slot: int, prompt: Sequence[int], sampling: Sampling, bias: Mapping[int, float] | None = None):
        """Gives the slot to a prompt, of which `rest(prompt)` is still to be filled in."""
        prompted_V, bias_V = np.zeros(self.vocab, bool), np.zeros(self.vocab, np.float32)
        prompted_V[list(prompt)] = True
        for token, added in (bias or {}).items():
            bias_V[token] = added
        self._rows = self._insert(self._rows, np.int32(slot), np.int32(prompt[-1]), sampling.row(), prompted_V, bias_V)

    def parts(self, prompt: Sequence[int]) -> list[Sequence[int]]:
        """The pieces in which all but the last token of a prompt are filled in."""
        most = self.pieces[-1]
        return [prompt[i : min(i + most, len(prompt) - 1)] for i in range(0, len(prompt) - 1, most)]

    def fill(self, slot: int, part: Sequence[int]) -> None:
        """Reads a piece into the slot's cache, behind what it holds."""
        size = next(size for size in self.pieces if size >= len(part))
        tokens_P = np.zeros(size, np.int32)
        tokens_P[: len(part)] = part
        self._rows = self._fill[size](self._weights, self._rows, np.int32(slot), tokens_P, np.int32(len(part)))

    def step(self, live: np.ndarray) -> Drawn:
        """One token more for the slots that are live; what is given for the others has no meaning."""
        self._rows, out = self._step(self._weights, self._rows, live)
        return Drawn(*map(np.asarray, jax.device_get(out)))

    def wait(self) -> None:
        """Returns when what was asked for is done."""
        jax.block_until_ready(self._rows.token_R)

    def clear(self) -> None:
        """Forgets all slots; after a program failed, what it was given is lost."""
        self._rows = self._cleared()

    def _cleared(self) -> Rows:
        R, V = self.count, self.vocab
        cache = jax.tree.map(
            lambda x, axis: jnp.zeros((*x.shape[:axis], R, *x.shape[axis:]), x.dtype), self._empty, self._axes
        )
        return Rows(cache, jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.int32), jnp.zeros((R, V), bool),
                    jnp.zeros((R, V), jnp.int32), jnp.zeros((R, V), jnp.float32), Draws.idle(R))  # fmt: skip


def _with(rows: Any, slot: Any, row: Any, axes: Any) -> Any:
    """The rows, with one of them written anew."""
    return jax.tree.map(
        lambda old, new, axis: lax.dynamic_update_index_in_dim(old, jnp.asarray(new).astype(old.dtype), slot, axis),
        rows, row, axes,
    )  # fmt: skip
