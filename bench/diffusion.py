# SPDX-License-Identifier: Apache-2.0
"""Do the models of diffusion compute what diffusers' do at their published sizes, and how long does it take?

    pip install diffusers==0.35.2 torch
    python bench/diffusion.py

Weights are drawn (diffusers' own beginnings, and what begins as zeros is drawn, too), written by diffusers and read by
batiste. A call is one prediction; rounds take turns, the median is told. Sampling is 20 steps of DDIM with guidance:
ours in one program, theirs a loop over the scheduler.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np

from batiste import nnx
from batiste.graph.text import table
from batiste.models import dit, unet
from batiste.models.diffusion import ddim, guided, linear, spaced

STEPS = 20
SIZES: dict[str, tuple[str, dict[str, Any], Callable[..., Any], int]] = {
    "dit-s4": ("DiTTransformer2DModel", {
        "num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "patch_size": 4, "sample_size": 32,
        "in_channels": 4, "out_channels": 8,
    }, dit.load_dit, 4),
    "dit-b4": ("DiTTransformer2DModel", {
        "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12, "patch_size": 4, "sample_size": 32,
        "in_channels": 4, "out_channels": 8,
    }, dit.load_dit, 2),
    "ddpm-cifar10-32": ("UNet2DModel", {
        "sample_size": 32, "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2, "downsample_padding": 0,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": None,
        "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    }, unet.load_unet, 2),
}  # fmt: skip


def both(name: str) -> tuple[Any, Any]:
    """Our model and theirs, with the same weights."""
    kind, settings, load, _ = SIZES[name]
    torch, diffusers = importlib.import_module("torch"), importlib.import_module("diffusers")
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**settings).eval()
    tensors = model.state_dict()
    for name, value in tensors.items():
        if ".norm1.emb." in name:  # of blocks that repeat those of the first
            value.copy_(tensors["transformer_blocks.0" + name[name.index(".norm1.emb.") :]])
        elif not value.any():
            torch.nn.init.normal_(value, std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(folder), model


def compared(name: str, batch: int, rounds: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[str, ...]:
    """A row: both give pictures, theirs with channels first."""
    expected = theirs().permute(0, 2, 3, 1).numpy()
    wrong = np.abs(np.asarray(ours()) - expected).max() / np.abs(expected).max()
    times = seconds(rounds, ours, theirs)
    return name, str(batch), f"{wrong:.1e}", *(f"{1000 * s:.0f}" for s in times), f"{times[0] / times[1]:.2f}"


def seconds(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """The median of each, in turns, after one call of each that is not counted."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, kept in zip(calls, taken):
            began = time.perf_counter()
            call()
            kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in taken]


def prediction(name: str, rounds: int) -> tuple[str, ...]:
    torch, (model, reference) = importlib.import_module("torch"), both(name)
    kind, settings, _, batch = SIZES[name]
    x = np.random.default_rng(0).normal(size=(batch, 32, 32, settings.get("in_channels", 3))).astype(np.float32)
    t, labels = np.linspace(900, 10, batch).astype(int), (np.arange(batch),) if kind.startswith("DiT") else ()
    run = nnx.jit(lambda model, x, t, *labels: model(x, t, *labels))
    theirs_x, *theirs_more = (torch.tensor(part) for part in (x.transpose(0, 3, 1, 2).copy(), t, *labels))

    def theirs() -> Any:
        with torch.no_grad():
            return reference(theirs_x, *theirs_more).sample

    ours = lambda: run(model, jnp.asarray(x), jnp.asarray(t), *labels).block_until_ready()
    return compared(name, batch, rounds, ours, theirs)


def sampling(rounds: int) -> tuple[str, ...]:
    """DDIM with guidance, of dit-s4."""
    torch, diffusers = importlib.import_module("torch"), importlib.import_module("diffusers")
    (model, reference), batch = both("dit-s4"), SIZES["dit-s4"][-1]
    x, labels = np.random.default_rng(0).normal(size=(batch, 32, 32, 4)).astype(np.float32), np.arange(batch)
    sample = nnx.jit(lambda model, x: ddim(guided(model, labels, none=1000, scale=4.0), x, linear(), spaced(STEPS)))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)

    def theirs() -> Any:
        now = torch.tensor(x.transpose(0, 3, 1, 2).copy())
        asked = torch.tensor(np.concatenate([labels, np.full(batch, 1000)]))
        with torch.no_grad():
            for t in scheduler.timesteps:
                said = reference(torch.cat([now, now]), t.expand(2 * batch), asked).sample[:, :4]
                given, free = said.chunk(2)
                now = scheduler.step(free + 4.0 * (given - free), t, now).prev_sample
        return now

    ours = lambda: sample(model, jnp.asarray(x)).block_until_ready()
    return compared(f"dit-s4, {STEPS} steps of DDIM", batch, rounds, ours, theirs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    headings = ("model", "batch", "largest difference", "batiste, ms", "diffusers, ms", "ratio")
    print(table([headings, *(prediction(name, args.rounds) for name in SIZES), sampling(args.rounds)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
