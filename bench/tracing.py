# SPDX-License-Identifier: Apache-2.0
"""How long does tracing a deep model take, beside the same model in Flax?

A transformer of many small blocks, each traced by itself: embedding, attention, two layers, two norms. What is timed is
the whole of `init` and of `apply` under `jax.eval_shape`, so nothing is compiled and nothing computed. The functional
face (`linen`) makes its variables in `init`; the object face (`nnx`) makes them in the constructor, and calls a model
merged from its state.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import batiste.linen
import batiste.nnx
from measure import Call, Slices, machine, print_table

VOCABULARY, WIDTH, HEADS = 64, 32, 4
TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def linen_calls(nn: ModuleType, blocks: int) -> dict[str, Call]:
    """The transformer in the functional face; `nn` is batiste's `linen` or Flax's."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x))
            return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(VOCABULARY, WIDTH)
            x = embed(tokens)
            for _ in range(blocks):
                x = Block()(x)
            return embed.attend(nn.LayerNorm()(x))

    def init() -> Any:
        return jax.eval_shape(lambda key, tokens: Transformer().init(key, tokens), jax.random.key(0), TOKENS)

    variables = init()
    return {
        "linen init": init,
        "linen apply": lambda: jax.eval_shape(lambda v, tokens: Transformer().apply(v, tokens), variables, TOKENS),
    }


def nnx_calls(nnx: ModuleType, blocks: int) -> dict[str, Call]:
    """The transformer in the object face; `nnx` is batiste's or Flax's."""

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs: Any):
            self.embed, self.norm = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(blocks)])

        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.embed.attend(self.norm(x))

    def init() -> Any:
        return nnx.eval_shape(lambda: Transformer(nnx.Rngs(0)))

    graphdef, state = nnx.split(init())
    return {
        "nnx init": init,
        "nnx apply": lambda: jax.eval_shape(lambda s, tokens: nnx.merge(graphdef, s)(tokens), state, TOKENS),
    }


def compare(blocks: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each of the four: both times, and their ratio where Flax is there."""
    ours = linen_calls(batiste.linen, blocks) | nnx_calls(batiste.nnx, blocks)
    calls = {f"batiste {name}": call for name, call in ours.items()}
    if peer := find_spec("flax") is not None:
        import flax.linen
        from flax import nnx as flax_nnx

        theirs = linen_calls(flax.linen, blocks) | nnx_calls(flax_nnx, blocks)
        calls |= {f"flax {name}": call for name, call in theirs.items()}
    slices = Slices(calls, seconds)
    return [
        {
            "what": name,
            "batiste_ms": slices.median(f"batiste {name}") * 1e3,
            "flax_ms": slices.median(f"flax {name}") * 1e3 if peer else None,
            "ratio": slices.ratio(f"batiste {name}", f"flax {name}") if peer else None,
        }
        for name in ours
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring")
    parser.add_argument("--json", action="store_true", help="one JSON line with everything at the end")
    args = parser.parse_args()
    print(machine())
    rows = compare(args.blocks, args.seconds)
    print_table(
        f"tracing a transformer of {args.blocks} blocks (CPU)",
        ["what", "batiste ms", "Flax ms", "ratio"],
        [
            [r["what"], f"{r['batiste_ms']:,.1f}"]
            + ([f"{r['flax_ms']:,.1f}", f"{r['ratio']:.2f}"] if r["ratio"] else ["", ""])
            for r in rows
        ],
    )
    if args.json:
        print(json.dumps({"machine": machine(), "tracing": rows}))


if __name__ == "__main__":
    main()
