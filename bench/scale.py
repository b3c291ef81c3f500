# SPDX-License-Identifier: Apache-2.0
"""What does training a decoder cost beside the plain JAX that one would write by hand?

Step time, tokens/s, model FLOP utilisation and memory of each preset, the two programs interleaved in one process;
then how compile time grows with depth. On a CPU the devices are simulated and the peak is that of a measured product.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "32")  # threads enough for two programs in flight to meet in their collectives

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import plain_decoder as plain
from batiste import nnx, sharding
from batiste.models import DECODERS, RULES, Decoder, DecoderConfig
from batiste.precision import policy
from batiste.training import Optimizer
from measure import Slices, machine, print_table

_c = partial(DecoderConfig, tied=True)
SIZES: dict[str, tuple[DecoderConfig, int, int]] = {  # configuration, batch, length
    "tiny": (DECODERS["tiny"], 8, 32),
    "8m": (_c(vocab=8192, features=256, layers=6, heads=8, kv_heads=8, hidden=704), 8, 256),
    "100m": (_c(vocab=32768, features=768, layers=10, heads=8, kv_heads=8, hidden=2048), 8, 128),
    "1b": (_c(vocab=32768, features=2048, layers=20, heads=16, kv_heads=8, hidden=6144), 8, 2048),
    "7b": (DECODERS["mistral-7b"].replace(window=None), 4, 2048),
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 products, of the vendors' data sheets
CHUNKS = 8


class Preset(NamedTuple):
    """What is chosen from outside."""

    plan: str = "single"
    dtype: str = "float32"
    run: str = "scan"
    remat: str | None = None

    def __str__(self) -> str:
        return ", ".join([self.plan, self.dtype, self.run, *([f"remat {self.remat}"] if self.remat else [])])


PRESETS = [
    Preset(), Preset(run="unroll"), Preset(remat="full"), Preset(remat="dots"), Preset(dtype="bfloat16"),
    Preset(dtype="bfloat16", remat="full"), Preset("dp"), Preset("fsdp"), Preset("fsdp", remat="full"),
    Preset("tensor"), Preset("fsdp", dtype="bfloat16", remat="full"),
]  # fmt: skip
TX = optax.adamw(1e-3)


class Program(NamedTuple):
    """A compiled step: called, it takes one; what it needs beside its arguments, and the loss of the first step."""

    call: Callable[[], Any]
    temp: int
    first: float


# ---------------------------------------------------------------- the two contenders
def plan_of(name: str) -> sharding.Plan | None:
    """The mesh of a preset; `tensor` divides in two, and the batch over what is left."""
    sizes: dict[str, Any] = {"dp": {"data": -1}, "fsdp": {"fsdp": -1}, "tensor": {"data": -1, "tensor": 2}}
    return sharding.ready_plan(rules=RULES, **sizes[name]) if name in sizes else None


def batiste_program(config: DecoderConfig, preset: Preset, tokens: jax.Array, lower_only: bool = False) -> Any:
    plan, precision = plan_of(preset.plan), policy(preset.dtype)

    def loss(model: Decoder, tokens: jax.Array) -> jax.Array:
        found = precision(model).loss(tokens, chunks=CHUNKS)
        return found.loss / found.weight

    def train_step(model: Decoder, optimizer: Optimizer, tokens: jax.Array) -> jax.Array:
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return value

    step = nnx.jit(plan.keep(train_step) if plan else train_step, donate_argnums=(0, 1))
    context = partial(sharding.use, plan) if plan else contextlib.nullcontext
    with context():
        make = lambda: Decoder(config, rngs=nnx.Rngs(0))
        model = jax.eval_shape(make) if lower_only else make()
        model.set_attributes(nnx.Stack, run=preset.run, remat=preset.remat)
        create = lambda model: Optimizer(model, TX, wrt=nnx.Param)
        optimizer = jax.eval_shape(create, model) if lower_only else create(model)
        if lower_only:
            return lambda: step.lower(model, optimizer, tokens)
        tokens = plan.shard_batch(tokens) if plan else tokens
        temp = temp_of(step.lower(model, optimizer, tokens).compile())
        first = float(step(model, optimizer, tokens))

    def call() -> jax.Array:
        with context():
            return step(model, optimizer, tokens)

    return Program(call, temp, first)


def plain_program(config: DecoderConfig, preset: Preset, tokens: jax.Array, start: Any = None,
                  lower_only: bool = False) -> Any:  # fmt: skip
    plan = plan_of(preset.plan)
    batch = NamedSharding(plan.mesh, PartitionSpec(plan.batch or None)) if plan else None
    step = partial(plain.step, config, TX, jnp.dtype(preset.dtype), preset.run, preset.remat, CHUNKS, batch)
    if lower_only:
        params = jax.eval_shape(partial(plain.initial, config), jax.random.key(0))
        state = jax.eval_shape(TX.init, params)
        return lambda: jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    params = start
    if plan:
        params = jax.device_put(params, plain.shardings(plan.mesh, preset.plan, params))
        tokens = jax.device_put(tokens, batch)
    state = jax.jit(TX.init, out_shardings=None if plan is None else state_places(params, plan))(params)
    outs = None if plan is None else (*jax.tree.map(lambda x: x.sharding, (params, state)), None)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=outs)
    program = jitted.lower(params, state, tokens).compile()
    held = [params, state]

    def call() -> jax.Array:
        *held[:], value = jitted(*held, tokens)
        return value

    return Program(call, temp_of(program), float(call()))


def state_places(params: Any, plan: sharding.Plan) -> Any:
    """Moments live where their parameters do."""
    whole, places = NamedSharding(plan.mesh, PartitionSpec()), jax.tree.map(lambda x: x.sharding, params)
    return optax.tree_map_params(TX, lambda _, place: place, jax.eval_shape(TX.init, params), places,
                                 transform_non_params=lambda _: whole)  # fmt: skip


def same_start(config: DecoderConfig) -> Any:
    """The values of the model, for the plain program."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    block: Any = model.blocks.layers
    found = {"attn_norm": block.attn_norm.scale, "mlp_norm": block.mlp_norm.scale, "norm": model.norm.scale,
             "embed": model.embed.embedding}  # fmt: skip
    found |= {name: getattr(block.attn, name).kernel for name in ("query", "key", "value", "out")}
    found |= {name: getattr(block.mlp, name).kernel for name in ("gate", "up", "down")}
    return {name: variable[...] for name, variable in found.items()}


def temp_of(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes if memory else 0


# ---------------------------------------------------------------- the tables
def peak_flops() -> float:
    """Of all devices: the vendor's figure, or on a CPU, whose simulated devices share its cores, of a large product."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS.items():
        if name in kind:
            return peak * jax.device_count()
    x = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)
    return 2 * 2048**3 / min(once_timed(lambda: product(x, x)) for _ in range(7))


def once_timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def steps(config: DecoderConfig, tokens: jax.Array, presets: list[Preset], seconds: float) -> list[dict[str, Any]]:
    rows, peak, count = [], peak_flops(), tokens.shape[0] * (tokens.shape[1] - 1)
    for preset in presets:
        ours = batiste_program(config, preset, tokens)
        theirs = plain_program(config, preset, tokens, same_start(config))
        slices = Slices({"batiste": ours.call, "plain": theirs.call}, seconds, least=5)
        wall = slices.median("batiste", "wall")
        flops = config.flops_per_token(tokens.shape[1] - 1) * count
        rows.append({"preset": str(preset), "ms": wall * 1e3, "tokens_per_s": count / wall, "mfu": flops / wall / peak,
                     "ratio": slices.ratio("batiste", "plain"), "wall_ratio": slices.ratio("batiste", "plain", "wall"),
                     "temp_mib": ours.temp / 2**20, "plain_temp_mib": theirs.temp / 2**20,
                     "loss": ours.first, "plain_loss": theirs.first})  # fmt: skip
        print("  done:", json.dumps(rows[-1]), flush=True)
    return rows


def compiles(config: DecoderConfig, tokens: jax.Array, depths: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """CPU seconds to trace and to compile a step of so many blocks; no value is made."""
    rows = []
    for run, depth in depths:
        for name, make in (("batiste", batiste_program), ("plain", plain_program)):
            lower = make(config.replace(layers=depth), Preset(run=run), tokens, lower_only=True)
            start = time.process_time(), time.perf_counter()
            lowered = lower()
            traced = time.process_time(), time.perf_counter()
            lowered.compile()
            rows.append({"program": name, "run": run, "blocks": depth, "trace_s": traced[0] - start[0],
                         "compile_s": time.process_time() - traced[0],
                         "compile_wall_s": time.perf_counter() - traced[1]})  # fmt: skip
            print("  done:", json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="8m", help="of the model (default: 8m, for two cores)")
    parser.add_argument("--presets", default="", help="numbers of the presets, such as 0,2 (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per preset (default: 10)")
    parser.add_argument("--depths", default="scan:6,scan:48,unroll:48", help="such as scan:6,unroll:6; or none")
    parser.add_argument("--batch", type=int, help="windows of a step")
    parser.add_argument("--json", action="store_true", help="end with the figures in one line")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    config, batch, length = SIZES[args.size]
    tokens = jax.random.randint(jax.random.key(1), (args.batch or batch, length + 1), 0, config.vocab)
    named = [] if args.presets == "none" else [i for i in args.presets.split(",") if i]
    if wrong := [i for i in named if not i.isdigit() or int(i) >= len(PRESETS)]:
        listed = "; ".join(f"{i} {preset}" for i, preset in enumerate(PRESETS))
        parser.error(f"--presets: there is no {', '.join(wrong)}; the presets are {listed}")
    chosen = [PRESETS[int(i)] for i in named] if args.presets else PRESETS
    print(f"{machine()}; {jax.device_count()} devices\n{args.size}: {config.parameters:,} parameters, "
          f"{tokens.shape[0]} x {length} tokens a step, adamw, cross-entropy in {CHUNKS} parts")  # fmt: skip
    found = {"steps": steps(config, tokens, chosen, args.seconds)}
    depths = [(run, int(n)) for run, _, n in (d.partition(":") for d in args.depths.split(",") if ":" in d)]
    found["compiles"] = compiles(config, tokens, depths)

    print_table("Steps: batiste, and its ratio to plain JAX (CPU time; wall; temporary memory)",
                ["preset", "ms", "tokens/s", "MFU", "CPU ratio", "wall ratio", "temp MiB", "plain MiB"],
                [[r["preset"], f"{r['ms']:.0f}", f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}", f"{r['ratio']:.3f}",
                  f"{r['wall_ratio']:.3f}", f"{r['temp_mib']:.0f}", f"{r['plain_temp_mib']:.0f}"]
                 for r in found["steps"]])  # fmt: skip
    print_table("Compiling a training step, CPU seconds", ["program", "blocks", "trace", "compile"],
                [[f"{r['program']}, {r['run']}", str(r["blocks"]), f"{r['trace_s']:.2f}", f"{r['compile_s']:.2f}"]
                 for r in found["compiles"]])  # fmt: skip
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
